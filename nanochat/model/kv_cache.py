"""The KV cache: a value that `model.decode` takes and returns. A TensorDict with one row per sequence:

    length       (B,) int64      number of tokens in the row
    before       (B, C)          embedding of the last token before the smear, for the smear of the next one
    layers.i.k/v (B, S, K, H)    one tensor per layer; a stacked one would be copied at every write

A layer keeps the window + 1 positions that a query can see, or the full context if that is shorter: position p is in
slot p mod S. A single token is written to its slot before it reads all of them, since every filled slot is in its
window. Several tokens would overwrite keys that the first of them needs: they read the old slots and the new keys, and
the slots are written afterwards. Letters: B rows, T tokens, S slots, K key/value heads, H head width, C width.
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
    config: ModelConfig, rows: int, context: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> Cache:
    """Return a cache of `rows` empty rows with room for `context` tokens each."""
    flat = {
        "length": torch.zeros(rows, dtype=torch.int64, device=device),
        "before": torch.zeros(rows, config.n_embd, dtype=dtype, device=device),
    }
    for i, window in enumerate(config.windows):
        shape = (rows, min(window + 1, context), config.n_kv_head, config.head_dim)
        flat |= {f"layers.{i}.{name}": torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}
    return tree.unflatten(flat)


def first_rows(cache: CacheLike, rows: int) -> dict[str, Any]:
    """Return a view of the first rows."""
    layers = {i: {name: x[:rows] for name, x in layer.items()} for i, layer in cache["layers"].items()}
    return {"length": cache["length"][:rows], "before": cache["before"][:rows], "layers": layers}


def copy_row_(cache: CacheLike, row: int, source_row: int) -> None:
    """Overwrite a row with another one."""
    for x in tree.leaves(cache):
        x[row] = x[source_row]


def write_one(
    layer: CacheLike, length_B: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, inplace: bool = False
) -> dict[str, Tensor]:
    """Return a layer's slots with one more token per row, T = 1."""
    rows = torch.arange(length_B.shape[0], device=length_B.device)
    slot_B = length_B % layer["k"].shape[1]
    put = torch.Tensor.index_put_ if inplace else torch.Tensor.index_put
    new = {"k": k_BTKH[:, 0], "v": v_BTKH[:, 0]}
    return {name: put(layer[name], (rows, slot_B), x) for name, x in new.items()}


def write_many(
    layer: CacheLike, length_B: Tensor, added_B: Tensor, k_BTKH: Tensor, v_BTKH: Tensor
) -> dict[str, Tensor]:
    """Return a layer's slots with the first `added_B` of T new tokens per row."""
    position_BS = _last_position(length_B + added_B, layer["k"].shape[1])
    is_new_BS11 = (position_BS >= length_B[:, None])[:, :, None, None]
    index_BS11 = (position_BS - length_B[:, None]).clamp(0, k_BTKH.shape[1] - 1)[:, :, None, None]

    def fill(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(is_new_BS11, new.gather(1, index_BS11.expand(-1, -1, *new.shape[2:])), old)

    return {"k": fill(layer["k"], k_BTKH), "v": fill(layer["v"], v_BTKH)}


def extend_(
    q_BTNH: Tensor, layer: CacheLike, start: int, k_BTKH: Tensor, v_BTKH: Tensor, window: int, attend: Any
) -> Tensor:
    """Write T tokens from position `start` on, in place, and return their attention (B, T, N, H).

    Args:
        layer: without a ring: position p of every row is in slot p. The first `start` slots are filled.
        q_BTNH: of all T tokens, or of none.
        attend: of `Compute`, for tokens that only see one another.
    """
    end, first = start + k_BTKH.shape[1], max(0, start - window)
    layer["k"][:, start:end], layer["v"][:, start:end] = k_BTKH, v_BTKH
    if not q_BTNH.shape[1]:
        return q_BTNH
    if start == 0:
        return attend(q_BTNH, k_BTKH, v_BTKH, window)
    key_S = torch.arange(first, end, device=q_BTNH.device)
    query_T1 = key_S[start - first :, None]
    mask_TS = (key_S <= query_T1) & (key_S >= query_T1 - window)
    return _attend(q_BTNH, layer["k"][:, first:end], layer["v"][:, first:end], mask_TS[None, None])


def attend_one(q_BTNH: Tensor, layer: CacheLike, length_B: Tensor, span: int | None = None) -> Tensor:
    """Return the attention (B, 1, N, H) of one query per row at position `length_B`, whose key is already written.

    Args:
        span: read only the first slots. Slice here, not in the caller: a compiled write into a slice copies all slots.
    """
    k_BSKH, v_BSKH = layer["k"][:, :span], layer["v"][:, :span]
    filled_BS = torch.arange(k_BSKH.shape[1], device=length_B.device) <= length_B[:, None]
    return _attend(q_BTNH, k_BSKH, v_BSKH, filled_BS[:, None, None])


def attend_many(
    q_BTNH: Tensor, layer: CacheLike, length_B: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int
) -> Tensor:
    """Return the attention (B, T, N, H) of T new tokens to the slots before they are written, and to one another."""
    time_T = torch.arange(q_BTNH.shape[1], device=length_B.device)
    query_BT = length_B[:, None] + time_T
    slot_BS = _last_position(length_B, layer["k"].shape[1])
    old_BTS = (slot_BS[:, None] >= 0) & (slot_BS[:, None] >= query_BT[:, :, None] - window)
    new_TT = (time_T <= time_T[:, None]) & (time_T >= time_T[:, None] - window)
    mask = torch.cat([old_BTS, new_TT.expand(length_B.shape[0], -1, -1)], dim=2)
    k, v = torch.cat([layer["k"], k_BTKH], dim=1), torch.cat([layer["v"], v_BTKH], dim=1)
    return _attend(q_BTNH, k, v, mask[:, None])


def _last_position(length_B: Tensor, n_slots: int) -> Tensor:
    """Return (B, S): the last position below `length` that belongs in a slot; negative for an empty slot."""
    last_B1 = length_B[:, None] - 1
    slot_S = torch.arange(n_slots, device=length_B.device)
    return last_B1 - (last_B1 - slot_S) % n_slots


def _attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    groups, n_time = q.shape[1] // k.shape[1], q.shape[2]
    if groups == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    # Queries that share keys become more time steps, so keys and values are not repeated.
    q = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3)
    mask = mask if n_time == 1 else mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.unflatten(2, (groups, n_time)).flatten(1, 2).transpose(1, 2)
