"""The cache of keys and values: a value that goes into `model.decode` and comes out of it.

A TensorDict of one row a sequence:

    length   (B,) int64      tokens of the row so far
    before   (B, C)          the last token's embedding before the smear, which the next token is smeared with
    layers.i.{k, v}          (B, S, K, H), keys and values of layer i; a tensor a layer: one stacked tensor would be
                             copied at every write

A layer keeps the window + 1 positions that a query can see, or the whole context where that is less: position p lies
in slot p mod S. A single token is written to its slot and reads the slots as they lie, because all that are filled
are within its window. Several tokens at once would overwrite what the first of them needs, so they read the old slots
beside the new keys, and the slots are filled afterwards.

Letters as in `model`: B batch (rows), T time (tokens), S slots, K key/value heads, H head width, C width.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree
from nanochat.model.params import ModelConfig

Cache = TensorDict
CacheLike = TensorDict | Mapping[str, Any]


def empty(
    config: ModelConfig,
    rows: int,
    context: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Cache:
    """Return a cache of `rows` rows without a token.

    Args:
        config: shape of the model. context: tokens that a row can take. dtype: of activations. device: where it lies.
    """
    flat = {
        "length": torch.zeros(rows, dtype=torch.int64, device=device),
        "before": torch.zeros(rows, config.n_embd, dtype=dtype, device=device),
    }
    for i, window in enumerate(config.windows):
        shape = (rows, min(window + 1, context), config.n_kv_head, config.head_dim)
        flat |= {f"layers.{i}.{name}": torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}
    return tree.unflatten(flat)


def bytes_per_row(config: ModelConfig, context: int, dtype: torch.dtype) -> int:
    """Return the bytes of one row of a cache, without allocating it."""
    return tree.nbytes(empty(config, 1, context, dtype=dtype, device="meta"))


def view(cache: CacheLike, rows: int) -> dict[str, Any]:
    """Return the first rows of a cache, without a copy."""
    layers = {i: {name: x[:rows] for name, x in layer.items()} for i, layer in cache["layers"].items()}
    return {"length": cache["length"][:rows], "before": cache["before"][:rows], "layers": layers}


def copy_row_(cache: CacheLike, row: int, source: CacheLike, source_row: int = 0) -> None:
    """Overwrite a row with one of another cache, whose layers may hold fewer slots: the shared ones are copied."""
    cache["length"][row] = source["length"][source_row]
    cache["before"][row] = source["before"][source_row]
    for i, layer in cache["layers"].items():
        for name, x in layer.items():
            given = source["layers"][i][name][source_row]
            x[row, : given.shape[0]] = given[: x.shape[1]]


def write_one(
    layer: CacheLike, length_B: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, donate: bool = False
) -> dict[str, Tensor]:
    """Return a layer's slots with one more token a row, T = 1; with `donate` in the memory of the old ones."""
    rows = torch.arange(length_B.shape[0], device=length_B.device)
    slot_B = length_B % layer["k"].shape[1]
    new = {"k": k_BTKH[:, 0], "v": v_BTKH[:, 0]}
    put = torch.Tensor.index_put_ if donate else torch.Tensor.index_put
    return {name: put(layer[name], (rows, slot_B), x) for name, x in new.items()}


def write_many(
    layer: CacheLike, length_B: Tensor, added_B: Tensor, k_BTKH: Tensor, v_BTKH: Tensor
) -> dict[str, Tensor]:
    """Return a layer's slots with the first `added_B` of T new tokens in each row."""
    n_slots = layer["k"].shape[1]
    position_BS = _last_position(length_B + added_B, n_slots)
    new_BS = position_BS >= length_B[:, None]
    from_BS11 = (position_BS - length_B[:, None]).clamp(0, k_BTKH.shape[1] - 1)[:, :, None, None]

    def filled(old: Tensor, given: Tensor) -> Tensor:
        return torch.where(new_BS[:, :, None, None], given.gather(1, from_BS11.expand(-1, -1, *given.shape[2:])), old)

    return {"k": filled(layer["k"], k_BTKH), "v": filled(layer["v"], v_BTKH)}


def attend_one(q_BTNH: Tensor, layer: CacheLike, length_B: Tensor, span: int | None = None) -> Tensor:
    """Return the attention (B, 1, N, H) of one query a row, at position `length_B`, whose key is written already.

    Args:
        span: read the first slots alone, where no row is longer: they are sliced here and not by the caller, because
            a compiled write into a slice of the slots would copy all of them.
    """
    k_BSKH, v_BSKH = layer["k"][:, :span], layer["v"][:, :span]
    filled_BS = torch.arange(k_BSKH.shape[1], device=length_B.device) <= length_B[:, None]
    return _attend(q_BTNH, k_BSKH, v_BSKH, filled_BS[:, None, None])


def attend_many(
    q_BTNH: Tensor, layer: CacheLike, length_B: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int
) -> Tensor:
    """Return the attention (B, T, N, H) of T new tokens to the slots as they were before, and to one another."""
    n_time = q_BTNH.shape[1]
    time_T = torch.arange(n_time, device=length_B.device)
    query_BT = length_B[:, None] + time_T
    slot_BS = _last_position(length_B, layer["k"].shape[1])
    old_BTS = (slot_BS[:, None] >= 0) & (slot_BS[:, None] >= query_BT[:, :, None] - window)
    new_TT = (time_T <= time_T[:, None]) & (time_T >= time_T[:, None] - window)
    seen = torch.cat([old_BTS, new_TT.expand(len(length_B), -1, -1)], dim=2)
    k, v = torch.cat([layer["k"], k_BTKH], dim=1), torch.cat([layer["v"], v_BTKH], dim=1)
    return _attend(q_BTNH, k, v, seen[:, None])


def _last_position(length_B: Tensor, n_slots: int) -> Tensor:
    """Return (B, S): the latest position before `length` that a slot holds; negative in a slot that is empty."""
    last_B1 = length_B[:, None] - 1
    slot_S = torch.arange(n_slots, device=length_B.device)
    return last_B1 - (last_B1 - slot_S) % n_slots


def _attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    groups, n_time = q.shape[1] // k.shape[1], q.shape[2]
    if groups == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
    # The queries that share keys follow one another in time: so keys and values are not repeated.
    q = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3)
    seen = seen if n_time == 1 else seen.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.unflatten(2, (groups, n_time)).flatten(1, 2).transpose(1, 2)
