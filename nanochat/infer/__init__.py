"""Decoding: a continuous-batching engine, seeded sampling, tool calls."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.infer import engine, grammar, prefill, sampling, tool_use
    from nanochat.infer.engine import (
        Engine,
        admit,
        cancel,
        complete,
        free_slots,
        load_params_,
        run,
        start,
        step,
        warm_up,
    )
    from nanochat.infer.request import Completion, Event, Request, TokenLogprobs
    from nanochat.infer.tool_use import calculate

__getattr__ = lazy_exports(__name__, __file__)
