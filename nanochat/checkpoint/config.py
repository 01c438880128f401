"""Checkpoint settings, importable without torch."""

import dataclasses

from nanochat.config import Device, Dtype, NonNegativeInt, PositiveInt, Settings


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Settings):
    """When checkpoints are written and which ones are kept.

    Attributes:
        every_steps: save every N steps; none: only at the end and on SIGTERM or Ctrl-C.
        keep_last: keep the N newest steps; none: keep all.
        keep_best: also keep the step with the lowest `val/bpb`.
        keep_every_steps: also keep every step divisible by N.
        asynchronous: write in the background; `save` returns once it has copied the state.
    """

    every_steps: PositiveInt | None = None
    keep_last: PositiveInt | None = 2
    keep_best: bool = True
    keep_every_steps: PositiveInt | None = None
    asynchronous: bool = True


@dataclasses.dataclass(frozen=True)
class LoadConfig(Settings):
    """Which trained model to load, and where.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. name@100: its step 100.
        step: of the checkpoint; none: the newest.
        device: where to compute; auto: CUDA, else MPS, else the CPU.
        dtype: dtype of the computation; auto: bfloat16 where a GPU has it, else float16; float32 on CPUs.
    """

    run: str | None = None
    step: NonNegativeInt | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
