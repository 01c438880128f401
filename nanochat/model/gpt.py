"""The forward pass as pure functions, in the order in which a token meets them: full sequences, then cached decoding.

Letters in names: B batch, T time (tokens), S cached positions, L layers, C width, N query heads, K key/value heads,
H head width, V vocabulary (padded in the embeddings), F hidden width of the MLP. RMS normalization has no scale, linear
layers have no bias.
Source: nanochat's GPT, July 2026.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree
from nanochat.distributed import Gather
from nanochat.model import attention, kv_cache
from nanochat.model.attention import Attend
from nanochat.model.kv_cache import CacheLike
from nanochat.model.linear import Linear, dense
from nanochat.model.params import SMEAR_WIDTH, VALUE_GATE_WIDTH, ModelConfig, ParamsLike, config_of

ROTARY_BASE = 100_000.0
LOGIT_CAP = 15.0
QK_SCALE = 1.2
TOP_LEVEL = ("wte", "resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda")
QKV, FUSED_QKV = ("q", "k", "v"), "qkv"
CONTEXT_LIMIT = 10  # in units of sequence_len: the longest sequence to which the rotary embedding is extrapolated


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute: an argument to swap, not a property of the parameters.

    Attributes:
        dtype: of the activations; None: that of the embedding.
        all_gather: {dotted name: this rank's shard} -> {name: full parameter}; None: parameters are full.
    """

    dtype: torch.dtype | None = None
    attend: Attend = attention.sdpa
    linear: Linear = dense
    all_gather: Gather | None = None


class PackedPositions(NamedTuple):
    """Positions of tokens in rows that hold several sequences, such as continuations that share a prefix; int64."""

    position_ids_BT: Tensor  # position of each token in its sequence
    previous_index_BT: Tensor  # index in the row of the token before it in its sequence; any at position 0


def apply(
    params: ParamsLike, tokens_BT: Tensor, *, config: ModelConfig | None = None, compute: Compute = Compute()
) -> Tensor:
    """Return next-token logits (B, T, V) in float32, within ±15.

    Args:
        config: only for parameters that have none attached, such as a plain dict.

    Raises:
        ValueError: the config does not match the parameters, T is over its limit, or (on CPU) an id is out of range.
    """
    config = check_inputs(params, tokens_BT, config, compute)
    x_BTC = features(params, tokens_BT, config=config, compute=compute)
    return unembed(x_BTC, get_param(params, "lm_head", compute), config, compute)


def check_inputs(params: ParamsLike, tokens_BT: Tensor, config: ModelConfig | None, compute: Compute) -> ModelConfig:
    """Return the config of the parameters; raises ValueError where it or the tokens do not fit them."""
    if tokens_BT.dim() != 2:
        raise ValueError(f"tokens of shape {tuple(tokens_BT.shape)}: expected (batch, time)")
    return config_of(params, config, sharded=compute.all_gather is not None)


def features(
    params: ParamsLike,
    tokens_BT: Tensor,
    *,
    config: ModelConfig,
    positions: PackedPositions | None = None,
    logits_from: int = 0,
    compute: Compute = Compute(),
) -> Tensor:
    """Return the final normalized activations (B, T - logits_from, C), before the unembedding.

    Args:
        positions: of packed rows; `compute.attend` has to know them too, and T is not limited.
        logits_from: the last layer computes only the columns from this one on.
    """
    n_time = tokens_BT.shape[1]
    if positions is None and n_time > CONTEXT_LIMIT * config.sequence_len:
        raise ValueError(
            f"sequence of {n_time} tokens: over the limit of {CONTEXT_LIMIT} x sequence_len={config.sequence_len}"
        )
    top = {name: get_param(params, name, compute) for name in TOP_LEVEL}
    embedded_BTC = embed(top, tokens_BT, compute)
    if positions is None:
        position_ids = torch.arange(n_time, device=tokens_BT.device)
        smeared_BTC = smear(top, embedded_BTC[:, 1:], embedded_BTC[:, :-1], compute)
        first_BTC = torch.cat([embedded_BTC[:, :1], smeared_BTC], dim=1)
    else:
        position_ids = positions.position_ids_BT
        index_BTC = positions.previous_index_BT[..., None].expand_as(embedded_BTC)
        smeared_BTC = smear(top, embedded_BTC, embedded_BTC.gather(1, index_BTC), compute)
        first_BTC = torch.where((position_ids > 0)[..., None], smeared_BTC, embedded_BTC)
    rotary = rotation(position_ids, config.head_dim, embedded_BTC.dtype)

    def attend(i: int, layer: ParamsLike, x_BTC: Tensor) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = project_qkv(layer, x_BTC, tokens_BT, rotary, config, compute)
        return compute.attend(q_BTNH, k_BTKH, v_BTKH, config.windows[i])

    return _layers(params, top, first_BTC, attend, config, compute, logits_from)


def get_param(params: ParamsLike, name: str, compute: Compute) -> Any:
    """Return the parameter or subtree with a dotted name, all-gathered where this rank holds shards."""
    value: Any = functools.reduce(lambda subtree, key: subtree[key], name.split("."), params)
    if compute.all_gather is None:
        return value
    if isinstance(value, Tensor):
        return compute.all_gather({name: value})[name]
    full = compute.all_gather(tree.flatten(value, f"{name}."))
    return tree.nest({key.removeprefix(f"{name}."): leaf for key, leaf in full.items()})


def embed(params: ParamsLike, tokens_BT: Tensor, compute: Compute) -> Tensor:
    """Return the normalized token embeddings (B, T, C) in the compute dtype."""
    try:
        x_BTC = F.embedding(tokens_BT, params["wte"])
    except IndexError:  # only the CPU kernel checks; reading the ids here would wait for the device and break vmap
        last = params["wte"].shape[0] - 1
        raise ValueError(f"token id out of range 0 … {last}: the tokenizer does not belong to this model") from None
    return rms(x_BTC if compute.dtype is None else x_BTC.to(compute.dtype))


def smear(params: ParamsLike, x_BTC: Tensor, previous_BTC: Tensor, compute: Compute) -> Tensor:
    """Return embeddings plus a gated fraction of the previous token's."""
    gate_BT1 = torch.sigmoid(compute.linear(x_BTC[..., :SMEAR_WIDTH], params["smear_gate"]))
    return x_BTC + params["smear_lambda"].to(x_BTC.dtype) * gate_BT1 * previous_BTC


def _layers(
    params: ParamsLike,
    top: Mapping[str, Tensor],
    first_BTC: Tensor,
    attend: Callable[[int, ParamsLike, Tensor], Tensor],
    config: ModelConfig,
    compute: Compute,
    logits_from: int = 0,
) -> Tensor:
    """Return the final activations; `attend` maps (layer index, its attention parameters, x_BTC) to (B, T, N, H)."""
    x_BTC, middle_BTC = first_BTC, first_BTC
    for i in range(config.n_layer):
        layer = get_param(params, f"layers.{i}", compute)
        x_BTC = top["resid_lambdas"][i] * x_BTC + top["x0_lambdas"][i] * first_BTC
        attended_BTC = attend(i, layer["attn"], rms(x_BTC)).flatten(2)
        if logits_from and i == config.n_layer - 1:
            x_BTC, middle_BTC, attended_BTC = (x[:, logits_from:] for x in (x_BTC, middle_BTC, attended_BTC))
        x_BTC = x_BTC + compute.linear(attended_BTC, layer["attn"]["proj"])
        x_BTC = x_BTC + mlp(layer["mlp"], rms(x_BTC), compute)
        if i == config.n_layer // 2:
            middle_BTC = x_BTC
    return rms(x_BTC - top["backout_lambda"].to(x_BTC.dtype) * middle_BTC)


def project_qkv(
    layer: ParamsLike,
    x_BTC: Tensor,
    tokens_BT: Tensor,
    rotary: tuple[Tensor, Tensor],
    config: ModelConfig,
    compute: Compute,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated, normalized queries (B,T,N,H) and keys (B,T,K,H), and values (B,T,K,H) with value embeddings."""
    names = layer.keys()
    if FUSED_QKV in names:
        heads = compute.linear(x_BTC, layer[FUSED_QKV]).unflatten(-1, (-1, config.head_dim))
        q_BTNH, k_BTKH, v_BTKH = heads.split([config.n_head, config.n_kv_head, config.n_kv_head], dim=2)
    else:
        q_BTNH, k_BTKH, v_BTKH = (compute.linear(x_BTC, layer[n]).unflatten(-1, (-1, config.head_dim)) for n in QKV)
    if "value_embed" in names:
        embed_BTKH = F.embedding(tokens_BT, layer["value_embed"]).to(x_BTC.dtype).unflatten(-1, (-1, config.head_dim))
        gate_BTK = 3 * torch.sigmoid(compute.linear(x_BTC[..., :VALUE_GATE_WIDTH], layer["value_gate"]))
        v_BTKH = v_BTKH + gate_BTK[..., None] * embed_BTKH
    return QK_SCALE * rms(rotate(q_BTNH, rotary)), QK_SCALE * rms(rotate(k_BTKH, rotary)), v_BTKH


def rotation(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos (…, 1, 1, H/2) and ±sin (…, 1, 2, H/2) of the rotary angles at integer positions (…)."""
    device = position_ids.device
    frequency = ROTARY_BASE ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = position_ids.float()[..., None, None, None] * frequency
    sin = angle.sin().to(dtype)
    return angle.cos().to(dtype), torch.cat([sin, -sin], dim=-2)


def rotate(x_BTNH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of every head by its position. Source: RoFormer (arXiv 2104.09864)."""
    cos, sin = rotary
    halves = x_BTNH.unflatten(-1, (2, -1))
    if x_BTNH.dtype == torch.float32:  # as on CPUs, for which Inductor does not vectorize `flip`
        (x1, x2), cos, sin = halves.unbind(-2), cos[..., 0, :], sin[..., 0, :]
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
    # On GPUs Inductor computes the gradient of `cat` in five kernels, and that of `flip` in one.
    return (halves * cos + halves.flip(-2) * sin).flatten(-2)


def mlp(layer: ParamsLike, x_BTC: Tensor, compute: Compute) -> Tensor:
    """Return proj(relu(fc x)²)."""
    return compute.linear(F.relu(compute.linear(x_BTC, layer["fc"])).square(), layer["proj"])


def rms(x: Tensor) -> Tensor:
    """Normalize the last axis to a root mean square of one."""
    return F.rms_norm(x, (x.shape[-1],))


def unembed(x_BTC: Tensor, lm_head_VC: Tensor, config: ModelConfig, compute: Compute = Compute()) -> Tensor:
    """Return logits (…, V) of final activations, softly capped at ±15; float64 for float64 input, else float32."""
    logits_BTV = tree.at_least_float32(compute.linear(x_BTC, lm_head_VC)[..., : config.vocab_size])
    return LOGIT_CAP * torch.tanh(logits_BTV / LOGIT_CAP)


def decode(
    params: ParamsLike,
    tokens_BT: Tensor,
    cache: CacheLike,
    *,
    added_B: Tensor | None = None,
    span: int | None = None,
    inplace: bool = False,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
) -> tuple[Tensor, CacheLike]:
    """Return logits (B, T, V) of tokens that follow a cache, as `apply` gives for full sequences, and the new cache.

    Args:
        tokens_BT: ids; rows with fewer than T new tokens are padded on the right.
        cache: from `kv_cache.empty`; each row must have room for its new tokens. Not changed, unless `inplace`.
        added_B: (B,) int64, number of new tokens per row, 0 … T; None: T. Logits of padding are meaningless.
        span: for T = 1, an upper bound on the lengths, new token included: later slots are not read.
        inplace: for T = 1, write into the memory of the cache, which uncompiled code would otherwise copy.
    """
    config = check_inputs(params, tokens_BT, config, compute)
    x_BTC, new = decode_features(
        params, tokens_BT, cache, config=config, added_B=added_B, span=span, inplace=inplace, compute=compute
    )
    logits_BTV = unembed(x_BTC, get_param(params, "lm_head", compute), config, compute)
    return logits_BTV, TensorDict(new, batch_size=[]) if isinstance(cache, TensorDict) else new


def decode_features(
    params: ParamsLike,
    tokens_BT: Tensor,
    cache: CacheLike,
    *,
    config: ModelConfig,
    added_B: Tensor | None = None,
    span: int | None = None,
    inplace: bool = False,
    start: int | None = None,
    cache_only: bool = False,
    compute: Compute = Compute(),
) -> tuple[Tensor, dict[str, Any]]:
    """Return the final activations (B, T, C) of `decode`, and the new cache as a dict.

    Args:
        start: the length of every row of a cache without rings, which is extended in place; see `kv_cache.extend_`.
        cache_only: with `start`, return (B, 0, C), and compute of the last layer only what the cache needs.
    """
    n_time = tokens_BT.shape[1]
    length_B = cache["length"]
    added_B = torch.full_like(length_B, n_time) if added_B is None else added_B
    top = {name: get_param(params, name, compute) for name in TOP_LEVEL}
    embedded_BTC = embed(top, tokens_BT, compute)
    position_BT = length_B[:, None] + torch.arange(n_time, device=tokens_BT.device)
    rotary = rotation(position_BT, config.head_dim, embedded_BTC.dtype)
    layers: dict[str, Any] = {}

    def attend(i: int, layer: ParamsLike, x_BTC: Tensor) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = project_qkv(layer, x_BTC, tokens_BT, rotary, config, compute)
        old = cache["layers"][str(i)]
        if start is not None:
            layers[str(i)] = old
            queries = q_BTNH[:, :0] if cache_only and i == config.n_layer - 1 else q_BTNH
            return kv_cache.extend_(queries, old, start, k_BTKH, v_BTKH, config.windows[i], compute.attend)
        if n_time == 1:
            layers[str(i)] = kv_cache.write_one(old, length_B, k_BTKH, v_BTKH, inplace)
            return kv_cache.attend_one(q_BTNH, layers[str(i)], length_B, span)
        layers[str(i)] = kv_cache.write_many(old, length_B, added_B, k_BTKH, v_BTKH)
        return kv_cache.attend_many(q_BTNH, old, length_B, k_BTKH, v_BTKH, config.windows[i])

    previous_BTC = torch.cat([cache["before"].to(embedded_BTC.dtype)[:, None], embedded_BTC], dim=1)
    smeared_BTC = smear(top, embedded_BTC, previous_BTC[:, :-1], compute)
    first_BTC = torch.where((position_BT > 0)[..., None], smeared_BTC, embedded_BTC)
    x_BTC = _layers(params, top, first_BTC, attend, config, compute, n_time if cache_only else 0)
    last_B1C = added_B[:, None, None].expand(-1, 1, previous_BTC.shape[2])
    new = {"length": length_B + added_B, "before": previous_BTC.gather(1, last_B1C)[:, 0], "layers": layers}
    return x_BTC, new


def fuse_qkv(params: ParamsLike) -> dict[str, Any]:
    """Return parameters with q, k and v in one matrix: faster decoding, where a product costs its kernel launch."""
    flat = tree.flatten(params)
    for name in [name.removesuffix(".q") for name in flat if name.endswith(".q")]:
        flat[f"{name}.{FUSED_QKV}"] = torch.cat([flat.pop(f"{name}.{part}") for part in QKV])
    return tree.nest(flat)
