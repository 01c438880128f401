"""Run a program that a model wrote: `run(code)` in namespaces of its own, behind a system call filter (Linux)."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.sandbox import bubblewrap, jail, seccomp
    from nanochat.sandbox.bubblewrap import MIB, Result, run

__getattr__ = lazy_exports(__name__, __file__)
