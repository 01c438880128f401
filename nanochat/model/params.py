"""The table of parameters: what a model consists of, and everything that follows from the table alone.

`spec(config)` names every parameter once, with its shape, logical axes, initial distribution and optimizer group;
initial values, placements, optimizer groups, counts and FLOPs all derive from it. What is computed with them is in
`model`, which offers these names as its own.

Letters in names: L layers, C width, N query heads, K key/value heads, H head width.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree
from nanochat.distributed import Layout, sharding

Params = TensorDict
ParamsLike = Params | Mapping[str, Any]
SMEAR_WIDTH = 24  # leading channels that decide how much of the previous token is smeared in
VALUE_GATE_WIDTH = 12  # leading channels that gate the value embedding
CONFIG_KEY = "config"
VOCAB_MULTIPLE = 64  # tables are padded to it, for fast kernels and even shards


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Attributes:
        sequence_len: training context in tokens, T.
        vocab_size: V; the tables are padded to a multiple of 64, the logits are cut back to V.
        n_layer, n_head, n_kv_head, n_embd: L, N, K, C; the head width is C / N, N is a multiple of K.
        window_pattern: letters S (short window) and L (full), tiled over the layers; the last layer is always L.
    """

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"model {name}={getattr(self, name)}: must be at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"model n_embd={self.n_embd}: must be n_head={self.n_head} times an even head width")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"model n_head={self.n_head}: must be a multiple of n_kv_head={self.n_kv_head}")
        if self.n_embd < SMEAR_WIDTH:
            raise ValueError(f"model n_embd={self.n_embd}: must be at least {SMEAR_WIDTH}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise ValueError(f"model window_pattern={self.window_pattern!r}: letters S and L only")

    @property
    def head_dim(self) -> int:
        """Head width H."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding tables: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> tuple[int, ...]:
        """The attention window of each layer, in tokens: query i sees keys i - window … i."""
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = self.window_pattern.upper()
        windows = [short if pattern[i % len(pattern)] == "S" else self.sequence_len for i in range(self.n_layer)]
        return (*windows[:-1], self.sequence_len)

    def has_value_embed(self, layer: int) -> bool:
        """Whether the layer mixes a value embedding in: every second one, the last included."""
        return layer % 2 == (self.n_layer - 1) % 2


def from_depth(
    depth: int,
    *,
    vocab_size: int = 32768,
    sequence_len: int = 2048,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
) -> ModelConfig:
    """Return the configuration that the one dial gives: width depth·aspect_ratio, rounded up to whole heads."""
    if head_dim < 1:
        raise ValueError(f"model head_dim={head_dim}: must be at least 1")
    n_head = -(-depth * aspect_ratio // head_dim)
    return ModelConfig(sequence_len, vocab_size, depth, n_head, n_head, n_head * head_dim, window_pattern)


Initializer = Callable[[Tensor, torch.Generator], Tensor]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One row of the table.

    Attributes:
        shape: sizes. axes: a logical name for each, for placement rules.
        init: (empty float32 tensor, generator) -> initial values.
        group: optimizer group, one of optim's.
        matmul: whether every token is multiplied by it (counts in the FLOPs).
        table: whether it is only looked up, and so stored in the compute dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    group: str
    matmul: bool = False
    table: bool = False


def normal(std: float) -> Initializer:
    """Return an initialiser of independent normal values."""
    return lambda x, generator: x.normal_(0, std, generator=generator)


def uniform(low: float, high: float) -> Initializer:
    """Return an initialiser of independent values, uniform in [low, high)."""
    return lambda x, generator: x.uniform_(low, high, generator=generator)


def constant(*values: float) -> Initializer:
    """Return an initialiser with given values, broadcast to the shape."""
    return lambda x, _: x.copy_(torch.tensor(values).expand_as(x))


def spec(config: ModelConfig) -> dict[str, ParamSpec]:
    """Return the table of all parameters by dotted name, in a fixed order."""
    c, v, f = config.n_embd, config.padded_vocab, 4 * config.n_embd
    n, k = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    s = 3**0.5 * c**-0.5  # a uniform distribution of ±s has standard deviation 1/sqrt(C)
    last = max(config.n_layer - 1, 1)
    layers = range(config.n_layer)

    def matrix(shape: tuple[int, int], axes: tuple[str, str], init: Initializer) -> ParamSpec:
        return ParamSpec(shape, axes, init, "matrix", matmul=True)

    rows = {
        "wte": ParamSpec((v, c), ("vocab", "embed"), normal(0.8), "embedding", table=True),
        "lm_head": ParamSpec((v, c), ("vocab", "embed"), normal(0.001), "unembedding", matmul=True),
        "resid_lambdas": ParamSpec(
            (config.n_layer,), ("layer",), constant(*[1.15 - 0.10 * i / last for i in layers]), "resid"
        ),
        "x0_lambdas": ParamSpec(
            (config.n_layer,), ("layer",), constant(*[0.20 - 0.15 * i / last for i in layers]), "x0"
        ),
        "smear_gate": ParamSpec((1, SMEAR_WIDTH), ("one", "gate"), uniform(0, 0.02), "smear", matmul=True),
        "smear_lambda": ParamSpec((1,), ("one",), constant(0.0), "smear"),
        "backout_lambda": ParamSpec((1,), ("one",), constant(0.2), "smear"),
    }
    for i in layers:
        rows |= {
            f"layers.{i}.attn.q": matrix((n, c), ("heads", "embed"), uniform(-s, s)),
            f"layers.{i}.attn.k": matrix((k, c), ("kv_heads", "embed"), uniform(-s, s)),
            f"layers.{i}.attn.v": matrix((k, c), ("kv_heads", "embed"), uniform(-s, s)),
            f"layers.{i}.attn.proj": matrix((c, n), ("embed", "heads"), constant(0.0)),
            f"layers.{i}.mlp.fc": matrix((f, c), ("hidden", "embed"), uniform(-0.4 * s, 0.4 * s)),
            f"layers.{i}.mlp.proj": matrix((c, f), ("embed", "hidden"), constant(0.0)),
        }
        if config.has_value_embed(i):
            gate = matrix((config.n_kv_head, VALUE_GATE_WIDTH), ("kv_heads_count", "gate"), uniform(0, 0.02))
            rows[f"layers.{i}.attn.value_gate"] = gate
            rows[f"layers.{i}.attn.value_embed"] = ParamSpec(
                (v, k), ("vocab", "kv_heads"), uniform(-s, s), "value_embedding", table=True
            )
    return rows


def init(
    config: ModelConfig,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
) -> Params:
    """Return the initial parameters: a function of the seed and each parameter's name, whatever the device or order.

    Args:
        config: the shape. seed: any int.
        device: where they go; "meta" allocates nothing and draws nothing.
        dtype: the compute dtype, in which the embedding tables are stored (float32 when it is float16).
        layout: of several ranks, each of which keeps its part; one whole parameter at a time is in memory.
    """
    device = torch.device(device)
    flat: dict[str, Tensor] = {}
    for name, row in spec(config).items():
        stored = storage_dtype(row, dtype)
        if device.type == "meta":
            flat[name] = sharding.place(layout, name, torch.empty(row.shape, dtype=stored, device=device))
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        flat[name] = sharding.place(layout, name, row.init(torch.empty(row.shape), generator).to(device, stored))
    return with_config(tree.unflatten(flat), config)


def storage_dtype(row: ParamSpec, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter is stored: float32, or the compute dtype for a table."""
    return compute_dtype if row.table and compute_dtype != torch.float16 else torch.float32


def with_config(params: Params, config: ModelConfig) -> Params:
    """Return the same parameters, which now carry `config` as non-tensor data: `apply` and the losses read it there.

    `tree.map`, torch.func and torch.compile keep it; it is not a leaf and not in checkpoints, whose metadata has it.
    """
    return params.copy().set_non_tensor(CONFIG_KEY, config)


def config_of(params: ParamsLike, config: ModelConfig | None = None, *, sharded: bool = False) -> ModelConfig:
    """Return the configuration that parameters carry; `config` is for those that carry none.

    Args:
        sharded: the leaves are this rank's shards, whose shapes say nothing.

    Raises:
        ValueError: there is none, or `config` contradicts the one that the parameters carry or their shapes.
    """
    carried = params[CONFIG_KEY] if CONFIG_KEY in params.keys() else None  # noqa: SIM118 (a TensorDict has no `in`)
    if config is None:
        config = carried
    if not isinstance(config, ModelConfig):
        raise ValueError(
            "the parameters carry no config: pass config=, or attach it with model.with_config(params, config)"
        )
    if carried is not None and carried is not config and carried != config:
        name = next(f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(carried, f.name))
        raise ValueError(
            f"config has {name}={getattr(config, name)!r}, the parameters carry a config with "
            f"{getattr(carried, name)!r}: omit config="
        )
    if not sharded:
        check(params, config)
    return config


def check(params: ParamsLike, config: ModelConfig) -> None:
    """Raise ValueError, naming the first difference, where `params` do not have the shapes of `config`."""
    n_layer = len(params["layers"].keys())
    found: dict[str, Any] = {
        "n_layer": n_layer,
        "n_embd": params["wte"].shape[1],
        "padded vocabulary": params["wte"].shape[0],
    }
    wanted = {"n_layer": config.n_layer, "n_embd": config.n_embd, "padded vocabulary": config.padded_vocab}
    last = params["layers"][str(n_layer - 1)]["attn"]
    found |= {"n_kv_head": last["value_gate"].shape[0], "n_head x head_dim": last["proj"].shape[1]}
    found["n_kv_head x head_dim"] = last["value_embed"].shape[1]
    wanted |= {"n_kv_head": config.n_kv_head, "n_head x head_dim": config.n_head * config.head_dim}
    wanted["n_kv_head x head_dim"] = config.n_kv_head * config.head_dim
    for name, value in found.items():
        if value != wanted[name]:
            raise ValueError(
                f"parameters have {name} {value}, the config {wanted[name]}: pass the config they were made with"
            )


def count(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters by optimizer group, their `total`, and the `scaling` parameters.

    The scaling parameters (all matrices and the unembedding) are those that the scaling rules go by.
    """
    counts: dict[str, int] = {}
    for row in spec(config).values():
        counts[row.group] = counts.get(row.group, 0) + torch.Size(row.shape).numel()
    total = sum(counts.values())
    return counts | {"total": total, "scaling": counts["matrix"] + counts["unembedding"]}


def flops_per_token(config: ModelConfig, n_time: int | None = None) -> int:
    """Return the FLOPs of one token's forward and backward pass, at `n_time` tokens (default: sequence_len).

    6 per parameter of every matrix product, and 12·N·H per key that a layer's window lets a token see.
    """
    n_time = n_time or config.sequence_len
    dense_params = sum(torch.Size(row.shape).numel() for row in spec(config).values() if row.matmul)
    keys = sum(min(window, n_time) for window in config.windows)
    return 6 * dense_params + 12 * config.n_head * config.head_dim * keys


def decode_flops(config: ModelConfig, context: int) -> int:
    """Return the FLOPs of one token's forward pass that sees `context` tokens, itself included, within the windows.

    2 per parameter of every matrix product, and 4·N·H per key.
    """
    dense_params = sum(torch.Size(row.shape).numel() for row in spec(config).values() if row.matmul)
    return 2 * dense_params + 4 * config.n_head * config.head_dim * sum(min(w, context) for w in config.windows)


def decode_bytes(config: ModelConfig, rows: int, context: int, itemsize: int) -> int:
    """Return the least bytes that a decode step of `rows` tokens reads: every matrix, and each row's keys and values.

    Args:
        context: tokens that a row sees, within the windows. itemsize: bytes of a number, in matrices and cache alike.
    """
    matrices = sum(torch.Size(row.shape).numel() for row in spec(config).values() if row.matmul)
    cached = 2 * config.n_kv_head * config.head_dim * sum(min(w, context) for w in config.windows)
    return itemsize * (matrices + rows * cached)
