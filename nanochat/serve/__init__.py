"""The chat server: requests and responses, scheduling, one worker process per GPU, HTTP, the page."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.serve import api, app, middleware, scheduler, schema, worker
    from nanochat.serve.api.answers import ApiConfig
    from nanochat.serve.middleware import Limits
    from nanochat.serve.scheduler import Scheduler
    from nanochat.serve.worker import ModelSource, WorkerConfig

__getattr__ = lazy_exports(__name__, __file__)
