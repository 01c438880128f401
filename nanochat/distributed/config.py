"""Settings of a job of several processes."""

import dataclasses
from typing import Literal

from nanochat.config import PositiveInt, Settings


@dataclasses.dataclass(frozen=True)
class ShardingConfig(Settings):
    """How the ranks of a training job divide parameters, gradients and optimizer state; see `sharding`.

    Attributes:
        mode: replicate, zero2 (optimizer state sharded), fsdp (parameters too) or hsdp (fsdp within groups); auto is
            zero2, which communicates least.
        shard_ranks: with hsdp, the ranks that share one copy; default: those of a node.
        gather: with fsdp and hsdp, layer: all-gather each layer when it is used, again in the backward, and reduce
            every micro-batch; step: once per step, which takes memory for full parameters and gradients.
        overlap: let the compiler run collectives at the same time as the computation.
    """

    mode: Literal["auto", "replicate", "zero2", "fsdp", "hsdp"] = "auto"
    shard_ranks: PositiveInt | None = None
    gather: Literal["layer", "step"] = "layer"
    overlap: bool = True

    @property
    def resolved_mode(self) -> str:
        return "zero2" if self.mode == "auto" else self.mode
