"""Checkpoint settings, importable without torch."""

import dataclasses

from nanochat.config import Device, Dtype, require_at_least


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which ones are kept.

    Attributes:
        every_steps: save every N steps; none: only at the end and on SIGTERM or Ctrl-C.
        keep_last: keep the N newest steps; none: keep all.
        keep_best: also keep the step with the lowest `val/bpb`.
        keep_every_steps: also keep every step divisible by N.
        asynchronous: write in the background; `save` returns once it has copied the state.
    """

    every_steps: int | None = None
    keep_last: int | None = 2
    keep_best: bool = True
    keep_every_steps: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, "checkpoint", every_steps=1, keep_last=1, keep_every_steps=1)


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """Which trained model to load, and where.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last.
        step: of the checkpoint; none: the newest.
        device: where to compute; auto: CUDA, else MPS, else the CPU.
        dtype: dtype of the computation; auto: bfloat16 on GPUs from Ampere on, else float32.
    """

    run: str | None = None
    step: int | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
