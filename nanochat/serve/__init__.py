"""The chat server: requests, scheduling, one worker process per GPU, HTTP, the page."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.serve import app, middleware, scheduler, schema, worker
    from nanochat.serve.middleware import Limits
    from nanochat.serve.scheduler import Scheduler
    from nanochat.serve.schema import ApiError, Delta, Sampling, StopSequenceFilter
    from nanochat.serve.worker import Settings

__getattr__ = lazy_exports(__name__, __file__)
