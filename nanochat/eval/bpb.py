"""Bits per byte, Σ nats / (ln 2 · Σ bytes): a loss that does not depend on the tokenizer.

Sums are over the targets that stand for bytes of text: special tokens and ignored targets are skipped.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import distributed
from nanochat.config import UserError
from nanochat.data import Tokenizer, tokenizer
from nanochat.model import IGNORE, Compute, ModelConfig, Params, loss

Batch = Mapping[str, Tensor]  # {"inputs", "targets"} of (B, T) ids
LossFn = Callable[[TensorDict, Batch], tuple[Tensor, dict[str, Tensor]]]


def bits_per_byte(params: TensorDict, batches: Iterable[Batch], tok: Tokenizer, loss_fn: LossFn) -> float:
    """Return the bits per byte of all ranks' batches; see `sum_nats`."""
    return over_ranks(*sum_nats(params, batches, tok, loss_fn))


@torch.no_grad()
def sum_nats(params: TensorDict, batches: Iterable[Batch], tok: Tokenizer, loss_fn: LossFn) -> tuple[Tensor, int]:
    """Return (nats, float64 on the CPU, bytes) of this rank's batches.

    Args:
        loss_fn: (params, batch) -> (mean nats, {"targets": number of targets}), 0-d, or (N,) of N members.
    """
    nats, n_bytes = torch.zeros((), dtype=torch.float64), 0
    for batch, sizes_BT in _with_sizes(params, batches, tok):
        mean, aux = loss_fn(params, {**batch, "targets": torch.where(sizes_BT > 0, batch["targets"], IGNORE)})
        nats = nats + mean.cpu().double() * aux["targets"].cpu()
        n_bytes += int(sizes_BT.sum())
    return nats, n_bytes


def over_ranks(nats: Tensor | float, n_bytes: int) -> float:
    """Return the bits per byte of all ranks' sums."""
    total_nats, total_bytes = distributed.all_reduce_sum([float(nats), n_bytes])
    if total_bytes == 0:
        raise UserError("bits per byte: no target is text")
    return total_nats / (math.log(2) * total_bytes)


@torch.no_grad()
def nats_by_row(
    params: Params, batches: Iterable[Batch], tok: Tokenizer, config: ModelConfig, compute: Compute
) -> Iterator[list[list[float]]]:
    """Yield for each batch the [nats, bytes] of its rows."""
    for batch, sizes_BT in _with_sizes(params, batches, tok):
        nats_BT = loss.per_token(params, batch, config=config, compute=compute, chunk_tokens=8192)
        nats_BT, sizes_BT = nats_BT.cpu().double(), sizes_BT.cpu()  # Metal has no float64
        yield torch.stack([torch.where(sizes_BT > 0, nats_BT, 0.0).sum(1), sizes_BT.sum(1)], dim=1).tolist()


def _with_sizes(params: TensorDict, batches: Iterable[Batch], tok: Tokenizer) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with the number of bytes of its targets, (B, T) int64."""
    token_bytes_V = torch.from_numpy(tokenizer.token_bytes(tok)).to(params["wte"].device)
    for batch in batches:
        targets_BT = batch["targets"]
        yield batch, token_bytes_V[targets_BT.clamp_min(0)] * (targets_BT != IGNORE)


def check(batches: Generator[tuple[Batch, Any, Any], None, None], tok: Tokenizer) -> None:
    """Raise a UserError unless a loader's validation data has text; print what it skips, and close it. Collective."""
    token_bytes_V, skipped, has_text = torch.from_numpy(tokenizer.token_bytes(tok)), [], False
    with distributed.raise_on_any_failure(), contextlib.closing(batches):
        for batch, state, _ in batches:
            targets, skipped = batch["targets"].cpu(), state["position"].get("skipped", [])
            if has_text := bool(token_bytes_V[targets[targets != IGNORE]].any()):
                break
    if not distributed.all_reduce_max(has_text):
        raise UserError("the validation data has no text to predict: change data.source or val_tasks")
    print("".join(f"skipped for validation: {text}\n" for text in skipped), end="", flush=True)
