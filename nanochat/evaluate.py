"""Evaluation of a model by its loss: bits per byte, a measure that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import runtime
from nanochat.loss import IGNORE

LossFn = Callable[[TensorDict, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


@torch.no_grad()
def bits_per_byte(
    params: TensorDict, batches: Iterable[Mapping[str, Tensor]], token_bytes_V: Tensor, loss_fn: LossFn
) -> float:
    """Return Σ nats / (ln 2 · Σ bytes) over the targets that stand for bytes, of all ranks' batches.

    Special tokens (0 bytes) and ignored targets are left out of both sums.

    Args:
        params: of the model, as a step computes with them. batches: {"inputs", "targets"} of (B, T) ids.
        token_bytes_V: (V,) int64, bytes that each token stands for, on the device of the batches.
        loss_fn: (params, batch) -> (mean nats over targets that count, {"targets": their number}).

    Raises:
        ValueError: no target stands for a byte.
    """
    nats = torch.zeros((), dtype=torch.float64)
    total_bytes = 0
    for batch in batches:
        targets = batch["targets"]
        sizes = token_bytes_V[targets.clamp_min(0)] * (targets != IGNORE)
        counted = {**batch, "targets": torch.where(sizes > 0, targets, IGNORE)}
        mean, aux = loss_fn(params, counted)
        nats += mean.cpu().double() * aux["targets"].cpu()
        total_bytes += int(sizes.sum())
    total_nats, total_bytes = runtime.total([float(nats), total_bytes])
    if total_bytes == 0:
        raise ValueError("bits per byte: no target stands for a byte of text")
    return total_nats / (math.log(2) * total_bytes)
