"""The model: pure functions from parameters and tokens to logits, of whole sequences or of what follows a cache.

The table of the parameters is in `parameters`; its names are offered here as well.

Letters in names: B batch, T time (tokens), S cached positions, L layers, C width, N query heads, K key/value heads,
H head width, V vocabulary (padded in the tables), F hidden width of the MLP. RMS normalisation has no scale, linear
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
from nanochat.model.params import (
    SMEAR_WIDTH,
    VALUE_GATE_WIDTH,
    ModelConfig,
    Params,
    ParamsLike,
    ParamSpec,
    config_of,
    count,
    decode_bytes,
    decode_flops,
    flops_per_token,
    from_depth,
    init,
    spec,
    storage_dtype,
    with_config,
)

__all__ = [
    "Compute",
    "ModelConfig",
    "PackedPositions",
    "ParamSpec",
    "Params",
    "apply",
    "config_of",
    "count",
    "decode",
    "decode_bytes",
    "decode_features",
    "decode_flops",
    "features",
    "flops_per_token",
    "from_depth",
    "fuse_qkv",
    "init",
    "spec",
    "storage_dtype",
    "unembed",
    "with_config",
]

ROTARY_BASE = 100_000.0
LOGIT_CAP = 15.0
QK_SCALE = 1.2
TOP = ("wte", "resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda")  # outside of the layers
QKV, FUSED = ("q", "k", "v"), "qkv"
CONTEXT_LIMIT = 10  # in units of sequence_len: how far the rotation is extrapolated before it is an error


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, apart from what: an argument to swap, not a property of the parameters.

    Attributes:
        dtype: of the activations; None takes that of the embedding table.
        attend: the attention kernel. linear: the matrix product.
        gather: {dotted name: this rank's part of a parameter} -> {name: whole parameter}; None: they are whole already.
    """

    dtype: torch.dtype | None = None
    attend: Attend = attention.sdpa
    linear: Linear = dense
    gather: Gather | None = None


class PackedPositions(NamedTuple):
    """Where the tokens of rows stand that are more than one line, such as several endings of one beginning.

    Attributes:
        position_BT: int64, of each token in its sequence. before_BT: int64, index in the row of the token before it,
            in its sequence; at position 0 any.
    """

    position_BT: Tensor
    before_BT: Tensor


def apply(
    params: ParamsLike, tokens_BT: Tensor, *, config: ModelConfig | None = None, compute: Compute = Compute()
) -> Tensor:
    """Return the logits of the next token at every position.

    Args:
        params: as from `init`. tokens_BT: (B, T) integer ids.
        config: the shape that the parameters were made with. compute: dtype and kernels.

    Returns:
        (B, T, V) float32 logits, within ±15.

    Raises:
        ValueError: the parameters are not of that configuration, T is over its limit, or an id is over the table
            (the last on the CPU only: elsewhere it would cost a wait for the device in every step).
    """
    config = config_of(params, config, sharded=compute.gather is not None)
    x_BTC = features(params, tokens_BT, config=config, compute=compute)
    return unembed(x_BTC, gathered(params, "lm_head", compute), config, compute)


def gathered(params: Params | Mapping[str, Any], name: str, compute: Compute) -> Any:
    """Return the parameter or subtree of that dotted name, its leaves made whole where this rank holds parts."""
    found: Any = functools.reduce(lambda subtree, key: subtree[key], name.split("."), params)
    if compute.gather is None:
        return found
    if isinstance(found, Tensor):
        return compute.gather({name: found})[name]
    whole = compute.gather(tree.flatten(found, f"{name}."))
    return tree.nest({key.removeprefix(f"{name}."): leaf for key, leaf in whole.items()})


def unembed(x_BTC: Tensor, lm_head_VC: Tensor, config: ModelConfig, compute: Compute = Compute()) -> Tensor:
    """Return the (…, V) logits of final activations, softly capped at ±15; float32, or float64 for such activations."""
    logits_BTV = attention.at_least_float32(compute.linear(x_BTC, lm_head_VC)[..., : config.vocab_size])
    return LOGIT_CAP * torch.tanh(logits_BTV / LOGIT_CAP)


def features(
    params: ParamsLike,
    tokens_BT: Tensor,
    *,
    order: PackedPositions | None = None,
    since: int = 0,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
) -> Tensor:
    """Return the final normalised activations (B, T, C), before the unembedding; arguments as for `apply`.

    Args:
        since: return (B, T - since, C), of the columns from there on; the last layer does not compute the others.
        order: of rows that are not one line each, whose attention (`compute.attend`) has to know it as well; the
            limit of T is then the caller's to keep.
    """
    config = _check_inputs(params, tokens_BT, config, compute)
    n_time = tokens_BT.shape[1]
    if order is None and n_time > CONTEXT_LIMIT * config.sequence_len:
        raise ValueError(
            f"sequence of {n_time} tokens: over the limit of {CONTEXT_LIMIT} x sequence_len={config.sequence_len}"
        )
    top = {name: gathered(params, name, compute) for name in TOP}
    embedded_BTC = embed(top, tokens_BT, compute)
    position = torch.arange(n_time, device=tokens_BT.device) if order is None else order.position_BT
    rotary = rotation(position, config.head_dim, embedded_BTC.dtype)

    def mix(i: int, layer: ParamsLike, x_BTC: Tensor) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = project_qkv(layer, x_BTC, tokens_BT, rotary, config, compute)
        return compute.attend(q_BTNH, k_BTKH, v_BTKH, config.windows[i])

    if order is None:
        smeared_BTC = smear(top, embedded_BTC[:, 1:], embedded_BTC[:, :-1], compute)
        first_BTC = torch.cat([embedded_BTC[:, :1], smeared_BTC], dim=1)
    else:
        before_BTC = embedded_BTC.gather(1, order.before_BT[..., None].expand_as(embedded_BTC))
        smeared_BTC = smear(top, embedded_BTC, before_BTC, compute)
        first_BTC = torch.where((position > 0)[..., None], smeared_BTC, embedded_BTC)
    return _layers(params, top, first_BTC, mix, config, compute, since)


def decode(
    params: ParamsLike,
    tokens_BT: Tensor,
    cache: CacheLike,
    *,
    added_B: Tensor | None = None,
    span: int | None = None,
    donate: bool = False,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
) -> tuple[Tensor, CacheLike]:
    """Return the logits of the tokens that follow a cache, and the cache with these tokens.

    It gives what `apply` gives for the whole sequences. Nothing is changed in place, unless it is donated; a compiled
    caller that copies the new cache into the old one writes only the new tokens.

    Args:
        params: as from `init`, or a nested dict of the same tensors.
        tokens_BT: (B, T) ids; rows with fewer than T new tokens are filled up on the right with any id.
        cache: as from `kv_cache.empty`; row b may not get more tokens than its context has room for.
        added_B: (B,) int64, tokens of each row that count, 0 … T; None: all. The rest give no sense and leave no trace.
        span: with T = 1, an upper bound on the lengths, this token included: slots from there on are not read.
        donate: with T = 1, write into the memory of the cache's keys and values, which the caller gives up: uncompiled,
            all of them would be copied for the sake of one token.
        config, compute: as for `apply`.

    Returns:
        ((B, T, V) float32 logits, the new cache: a TensorDict or a dict, as it was given).
    """
    config = config_of(params, config, sharded=compute.gather is not None)
    how: dict[str, Any] = {"added_B": added_B, "span": span, "donate": donate, "config": config, "compute": compute}
    x_BTC, new = decode_features(params, tokens_BT, cache, **how)
    logits_BTV = unembed(x_BTC, gathered(params, "lm_head", compute), config, compute)
    return logits_BTV, TensorDict(new, batch_size=[]) if isinstance(cache, TensorDict) else new


def decode_features(
    params: ParamsLike,
    tokens_BT: Tensor,
    cache: CacheLike,
    *,
    added_B: Tensor | None = None,
    span: int | None = None,
    donate: bool = False,
    fresh: bool = False,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
) -> tuple[Tensor, dict[str, Any]]:
    """Return the final activations (B, T, C) of `decode`, and the new cache as a dict.

    Args:
        fresh: the cache is empty: the tokens attend to one another alone, by the kernel of `compute`. Else as `decode`.
    """
    config = _check_inputs(params, tokens_BT, config, compute)
    n_time = tokens_BT.shape[1]
    length_B = cache["length"]
    added_B = torch.full_like(length_B, n_time) if added_B is None else added_B
    top = {name: gathered(params, name, compute) for name in TOP}
    embedded_BTC = embed(top, tokens_BT, compute)
    position_BT = length_B[:, None] + torch.arange(n_time, device=tokens_BT.device)
    rotary = rotation(position_BT, config.head_dim, embedded_BTC.dtype)
    layers: dict[str, Any] = {}

    def mix(i: int, layer: ParamsLike, x_BTC: Tensor) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = project_qkv(layer, x_BTC, tokens_BT, rotary, config, compute)
        old = cache["layers"][str(i)]
        if n_time == 1 and not fresh:
            layers[str(i)] = kv_cache.write_one(old, length_B, k_BTKH, v_BTKH, donate)
            return kv_cache.attend_one(q_BTNH, layers[str(i)], length_B, span)
        layers[str(i)] = kv_cache.write_many(old, length_B, added_B, k_BTKH, v_BTKH)
        if fresh:
            return compute.attend(q_BTNH, k_BTKH, v_BTKH, config.windows[i])
        return kv_cache.attend_many(q_BTNH, old, length_B, k_BTKH, v_BTKH, config.windows[i])

    before_BTC = torch.cat([cache["before"].to(embedded_BTC.dtype)[:, None], embedded_BTC], dim=1)
    smeared_BTC = smear(top, embedded_BTC, before_BTC[:, :-1], compute)
    first_BTC = torch.where((position_BT > 0)[..., None], smeared_BTC, embedded_BTC)
    x_BTC = _layers(params, top, first_BTC, mix, config, compute)
    last_B1C = added_B[:, None, None].expand(-1, 1, before_BTC.shape[2])
    new = {"length": length_B + added_B, "before": before_BTC.gather(1, last_B1C)[:, 0], "layers": layers}
    return x_BTC, new


def fuse_qkv(params: ParamsLike) -> dict[str, Any]:
    """Return the parameters with the matrices of queries, keys and values in one: for decoding, not for training.

    At a token a row, what a product costs is the start of its kernel. `apply` takes them as well.
    """
    flat = tree.flatten(params)
    for name in [name.removesuffix(".q") for name in flat if name.endswith(".q")]:
        flat[f"{name}.{FUSED}"] = torch.cat([flat.pop(f"{name}.{part}") for part in QKV])
    return tree.nest(flat)


def _check_inputs(params: ParamsLike, tokens_BT: Tensor, config: ModelConfig | None, compute: Compute) -> ModelConfig:
    if tokens_BT.dim() != 2:
        raise ValueError(f"tokens of shape {tuple(tokens_BT.shape)}: expected (batch, time)")
    return config_of(params, config, sharded=compute.gather is not None)


def _layers(
    params: ParamsLike,
    top: Mapping[str, Tensor],
    first_BTC: Tensor,
    mix: Callable[[int, ParamsLike, Tensor], Tensor],
    config: ModelConfig,
    compute: Compute,
    since: int = 0,
) -> Tensor:
    """Return the final activations, given those before the first layer and what attention makes: (B, T, N, H)."""
    x_BTC, middle_BTC = first_BTC, first_BTC
    for i in range(config.n_layer):
        layer = gathered(params, f"layers.{i}", compute)
        x_BTC = top["resid_lambdas"][i] * x_BTC + top["x0_lambdas"][i] * first_BTC
        mixed_BTC = mix(i, layer["attn"], rms(x_BTC)).flatten(2)
        if since and i == config.n_layer - 1:
            x_BTC, middle_BTC, mixed_BTC = x_BTC[:, since:], middle_BTC[:, since:], mixed_BTC[:, since:]
        x_BTC = x_BTC + compute.linear(mixed_BTC, layer["attn"]["proj"])
        x_BTC = x_BTC + mlp(layer["mlp"], rms(x_BTC), compute)
        if i == config.n_layer // 2:
            middle_BTC = x_BTC
    return rms(x_BTC - top["backout_lambda"].to(x_BTC.dtype) * middle_BTC)


def embed(params: ParamsLike, tokens_BT: Tensor, compute: Compute) -> Tensor:
    """Return the normalised token embeddings (B, T, C) in the compute dtype."""
    try:
        x_BTC = F.embedding(tokens_BT, params["wte"])
    except IndexError:  # of the kernels, the CPU's alone checks; the ids themselves are not read here: vmap forbids it
        last = params["wte"].shape[0] - 1
        raise ValueError(
            f"token id outside of 0 … {last}, the rows of the embedding table: "
            "the tokenizer is not the one that the model was made for"
        ) from None
    return rms(x_BTC if compute.dtype is None else x_BTC.to(compute.dtype))


def smear(params: ParamsLike, now_BTC: Tensor, before_BTC: Tensor, compute: Compute) -> Tensor:
    """Return embeddings with a gated share of those one position before added to them."""
    gate_BT1 = torch.sigmoid(compute.linear(now_BTC[..., :SMEAR_WIDTH], params["smear_gate"]))
    return now_BTC + params["smear_lambda"].to(now_BTC.dtype) * gate_BT1 * before_BTC


def project_qkv(
    layer: ParamsLike,
    x_BTC: Tensor,
    tokens_BT: Tensor,
    rotary: tuple[Tensor, Tensor],
    config: ModelConfig,
    compute: Compute,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated, normalised queries (B,T,N,H) and keys (B,T,K,H), and values (B,T,K,H) with their embedding."""
    heads = config.head_dim
    if FUSED in layer.keys():  # noqa: SIM118 (a TensorDict is not a container of its keys)
        every = compute.linear(x_BTC, layer[FUSED]).unflatten(-1, (-1, heads))
        q_BTNH, k_BTKH, v_BTKH = every.split([config.n_head, config.n_kv_head, config.n_kv_head], dim=2)
    else:
        q_BTNH, k_BTKH, v_BTKH = (compute.linear(x_BTC, layer[n]).unflatten(-1, (-1, heads)) for n in QKV)
    if "value_embed" in layer.keys():  # noqa: SIM118 (a TensorDict is not a container of its keys)
        embed_BTKH = F.embedding(tokens_BT, layer["value_embed"]).to(x_BTC.dtype).unflatten(-1, (-1, heads))
        gate_BTK = 3 * torch.sigmoid(compute.linear(x_BTC[..., :VALUE_GATE_WIDTH], layer["value_gate"]))
        v_BTKH = v_BTKH + gate_BTK[..., None] * embed_BTKH
    return QK_SCALE * rms(rotate(q_BTNH, rotary)), QK_SCALE * rms(rotate(k_BTKH, rotary)), v_BTKH


def mlp(layer: ParamsLike, x_BTC: Tensor, compute: Compute) -> Tensor:
    """Return the MLP's contribution (B, T, C): proj(relu(fc x)²)."""
    return compute.linear(F.relu(compute.linear(x_BTC, layer["fc"])).square(), layer["proj"])


def rms(x: Tensor) -> Tensor:
    """Normalise the last axis to a root mean square of one."""
    return F.rms_norm(x, (x.shape[-1],))


def rotation(position: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles at integer positions of any shape (…), each (…, 1, H/2)."""
    device = position.device
    frequency = ROTARY_BASE ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = position.float()[..., None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BTNH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of every head by its position. Source: RoFormer (arXiv 2104.09864)."""
    cos, sin = rotary
    x1, x2 = x_BTNH.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
