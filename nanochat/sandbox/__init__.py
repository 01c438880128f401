"""Run Python that a model wrote, isolated by the Linux kernel: `sandbox.run(code)`. Imports neither torch nor NumPy."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.sandbox.bubblewrap import Result, available, run

__getattr__ = lazy_exports(__name__, __file__)
