"""The model once more, in plain JAX: it opens a checkpoint with orbax and gives `model.apply`'s logits.

    params, config = load(run_folder / "checkpoints" / "340")
    logits = apply(params, config, tokens)

It imports nothing of this project: a checkpoint is arrays under names, and the model a function of them.
Letters in names: B batch, T time, C width, N query heads, K key/value heads, H head width.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

Tree = dict[str, Any]


def load(step: Path) -> tuple[Tree, dict[str, Any]]:
    """Return the parameters, nested by name, and the fields of the config, from the folder of a step."""
    config = json.loads((step / "meta" / "metadata").read_text())["meta"]["model"]
    params = ocp.PyTreeCheckpointer().restore(step / "state")["params"]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), config


def apply(params: Tree, config: dict[str, Any], tokens_BT: Array) -> Array:
    """Return next-token logits (B, T, V) in float32."""
    n_layer, full = config["n_layer"], config["sequence_len"]
    short = -(-full // 4 // 128) * 128
    pattern = config["window_pattern"].upper()
    windows = [short if pattern[i % len(pattern)] == "S" else full for i in range(n_layer - 1)] + [full]

    embedded_BTC = rms(params["wte"][tokens_BT])
    gate_BT1 = jax.nn.sigmoid(embedded_BTC[:, 1:, :24] @ params["smear_gate"].T)
    smeared_BTC = embedded_BTC[:, 1:] + params["smear_lambda"] * gate_BT1 * embedded_BTC[:, :-1]
    x_BTC = first_BTC = jnp.concatenate([embedded_BTC[:, :1], smeared_BTC], axis=1)
    middle_BTC = x_BTC
    for i in range(n_layer):
        layer = params["layers"][str(i)]
        x_BTC = params["resid_lambdas"][i] * x_BTC + params["x0_lambdas"][i] * first_BTC
        x_BTC = x_BTC + attention(layer["attn"], rms(x_BTC), tokens_BT, config, windows[i])
        hidden_BTF = jax.nn.relu(rms(x_BTC) @ layer["mlp"]["fc"].T) ** 2
        x_BTC = x_BTC + hidden_BTF @ layer["mlp"]["proj"].T
        if i == n_layer // 2:
            middle_BTC = x_BTC
    x_BTC = rms(x_BTC - params["backout_lambda"] * middle_BTC)
    logits_BTV = (x_BTC @ params["lm_head"].T)[..., : config["vocab_size"]]
    return 15 * jnp.tanh(logits_BTV / 15)


def attention(layer: Tree, x_BTC: Array, tokens_BT: Array, config: dict[str, Any], window: int) -> Array:
    """Return attention (B, T, C) of normalized activations; query i sees keys i - window … i."""
    n_batch, n_time = tokens_BT.shape
    n_head, n_kv = config["n_head"], config["n_kv_head"]
    width = config["n_embd"] // n_head
    q_BTNH = (x_BTC @ layer["q"].T).reshape(n_batch, n_time, n_head, width)
    k_BTKH, v_BTKH = ((x_BTC @ layer[name].T).reshape(n_batch, n_time, n_kv, width) for name in ("k", "v"))
    if "value_embed" in layer:
        gate_BTK = 3 * jax.nn.sigmoid(x_BTC[..., :12] @ layer["value_gate"].T)
        v_BTKH = v_BTKH + gate_BTK[..., None] * layer["value_embed"][tokens_BT].reshape(v_BTKH.shape)
    q_BTNH, k_BTKH = 1.2 * rms(rotate(q_BTNH)), 1.2 * rms(rotate(k_BTKH))
    k_BTNH, v_BTNH = (jnp.repeat(x, n_head // n_kv, axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) / width**0.5
    i, j = jnp.arange(n_time)[:, None], jnp.arange(n_time)[None]
    scores_BNTS = jnp.where((j <= i) & (j >= i - window), scores_BNTS, -jnp.inf)
    out_BTNH = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores_BNTS), v_BTNH)
    return out_BTNH.reshape(n_batch, n_time, -1) @ layer["proj"].T


def rotate(x_BTNH: Array) -> Array:
    """Rotate the two halves of every head by its position."""
    n_time, width = x_BTNH.shape[1], x_BTNH.shape[-1]
    frequency = 100_000.0 ** -(jnp.arange(0, width, 2) / width)
    angle = (jnp.arange(n_time)[:, None] * frequency)[:, None]
    x1, x2 = jnp.split(x_BTNH, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def rms(x: Array) -> Array:
    """Normalize the last axis to a root mean square of one, as torch does in float32."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.finfo(x.dtype).eps)
