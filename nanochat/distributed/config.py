"""Settings of a job of several processes."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How a training job of several processes shares its memory and its work.

    Attributes:
        mode: replicate, zero2, fsdp or hsdp, as in the table above; auto is zero2, which sends least.
        shard_ranks: of hsdp, ranks that share one copy; none: those of a node.
        gather: of fsdp and hsdp: each layer as it is used, and again in the backward, with a reduction for every
            micro-batch; or all once a step, with one reduction, at the price of whole parameters and gradients.
        overlap: let the compiler bucket collectives and move them beside the computation.
    """

    mode: Literal["auto", "replicate", "zero2", "fsdp", "hsdp"] = "auto"
    shard_ranks: int | None = None
    gather: Literal["layer", "step"] = "layer"
    overlap: bool = True
