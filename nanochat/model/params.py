"""The parameter table: `spec(config)` names every parameter once; everything else about parameters derives from it.

Initial values, placements, optimizer groups, counts, FLOPs and the abstract checkpoint tree all come from the table.
Letters in names: L layers, C width, N query heads, K key/value heads, H head width, V vocabulary.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree
from nanochat.distributed import ShardingPlan, sharding

Params = TensorDict
ParamsLike = Params | Mapping[str, Any]
CONFIG_KEY = "config"  # of the non-tensor data in parameters
SMEAR_WIDTH = 24  # leading channels that gate how much of the previous token is smeared in
VALUE_GATE_WIDTH = 12  # leading channels that gate the value embedding
VOCAB_MULTIPLE = 64  # embedding rows are padded to it, for fast kernels and even shards


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Attributes:
        sequence_len: training context in tokens, T.
        vocab_size: V; embedding tables are padded to a multiple of 64, logits are cut back to V.
        n_layer, n_head, n_kv_head, n_embd: L, N, K, C; the head width is C / N, and N is a multiple of K.
        window_pattern: letters S (short window) and L (full context), tiled over the layers; the last layer is L.
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
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Number of embedding rows."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> tuple[int, ...]:
        """Attention window of each layer in tokens: query i sees keys i - window … i."""
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = self.window_pattern.upper()
        windows = [short if pattern[i % len(pattern)] == "S" else self.sequence_len for i in range(self.n_layer)]
        return (*windows[:-1], self.sequence_len)

    def has_value_embed(self, layer: int) -> bool:
        """Whether the layer has a value embedding: every second one does, the last included."""
        return layer % 2 == (self.n_layer - 1) % 2


def from_depth(depth: int, *, aspect_ratio: int = 64, head_dim: int = 128, **shape: Any) -> ModelConfig:
    """Return the config for a depth: the width is depth·aspect_ratio, rounded up to a multiple of `head_dim`."""
    if head_dim < 1:
        raise ValueError(f"model head_dim={head_dim}: must be at least 1")
    n_head = -(-depth * aspect_ratio // head_dim)
    return ModelConfig(n_layer=depth, n_head=n_head, n_kv_head=n_head, n_embd=n_head * head_dim, **shape)


Initializer = Callable[[Tensor, torch.Generator], Tensor]  # (empty float32 tensor, generator) -> initial values


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One row of the table."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # a logical name per dimension, for placement rules
    init: Initializer
    group: str  # of the optimizer
    matmul: bool = False  # every token is multiplied by it, so it counts in the FLOPs
    embedding: bool = False  # it is only looked up, and so stored in the compute dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def normal(std: float) -> Initializer:
    return lambda x, generator: x.normal_(0, std, generator=generator)


def uniform(low: float, high: float) -> Initializer:
    return lambda x, generator: x.uniform_(low, high, generator=generator)


def constant(*values: float) -> Initializer:
    return lambda x, _: x.copy_(torch.tensor(values).expand_as(x))


def spec(config: ModelConfig) -> dict[str, ParamSpec]:
    """Return the table {dotted name: row}, in a fixed order."""
    n_layer, c, v, f = config.n_layer, config.n_embd, config.padded_vocab, 4 * config.n_embd
    n, k = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    s = 3**0.5 * c**-0.5  # a uniform distribution of ±s has standard deviation 1/sqrt(C)
    resid = [1.15 - 0.10 * i / max(n_layer - 1, 1) for i in range(n_layer)]
    x0 = [0.20 - 0.15 * i / max(n_layer - 1, 1) for i in range(n_layer)]

    def matrix(shape: tuple[int, int], axes: tuple[str, str], init: Initializer) -> ParamSpec:
        return ParamSpec(shape, axes, init, "matrix", matmul=True)

    rows = {
        "wte": ParamSpec((v, c), ("vocab", "embed"), normal(0.8), "embedding", embedding=True),
        "lm_head": ParamSpec((v, c), ("vocab", "embed"), normal(0.001), "unembedding", matmul=True),
        "resid_lambdas": ParamSpec((n_layer,), ("layer",), constant(*resid), "resid"),
        "x0_lambdas": ParamSpec((n_layer,), ("layer",), constant(*x0), "x0"),
        "smear_gate": ParamSpec((1, SMEAR_WIDTH), ("one", "gate"), uniform(0, 0.02), "smear", matmul=True),
        "smear_lambda": ParamSpec((1,), ("one",), constant(0.0), "smear"),
        "backout_lambda": ParamSpec((1,), ("one",), constant(0.2), "smear"),
    }
    for i in range(n_layer):
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
            embed = ParamSpec((v, k), ("vocab", "kv_heads"), uniform(-s, s), "value_embedding", embedding=True)
            rows |= {f"layers.{i}.attn.value_gate": gate, f"layers.{i}.attn.value_embed": embed}
    return rows


def init(
    config: ModelConfig,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sharding_plan: ShardingPlan | None = None,
) -> Params:
    """Return initial parameters, a function of the seed and each parameter's name alone.

    Args:
        device: "meta" allocates and draws nothing.
        dtype: the compute dtype, in which embeddings are stored (float32 for float16).
        sharding_plan: of several ranks; each keeps its shards, with one full parameter in memory at a time.
    """
    rows = init_rows(spec(config), seed, device=device, dtype=dtype, sharding_plan=sharding_plan)
    return with_config(rows, config)


def init_rows(
    rows: Mapping[str, ParamSpec],
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sharding_plan: ShardingPlan | None = None,
) -> Params:
    """Return the initial values of the rows of a table, as `init` does for the model's."""
    device = torch.device(device)
    flat: dict[str, Tensor] = {}
    for name, row in rows.items():
        if device.type == "meta":
            x = torch.empty(row.shape, device=device)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            x = row.init(torch.empty(row.shape), generator)
        flat[name] = sharding.place(sharding_plan, name, x.to(device, storage_dtype(row, dtype)))
    return tree.unflatten(flat)


def storage_dtype(row: ParamSpec, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter is stored: float32, or the compute dtype for an embedding."""
    return compute_dtype if row.embedding and compute_dtype != torch.float16 else torch.float32


def with_config(params: Params, config: ModelConfig) -> Params:
    """Return the parameters with `config` attached as non-tensor data: kept by `tree.map`, torch.func and compile."""
    return params.copy().set_non_tensor(CONFIG_KEY, config)


def config_of(params: ParamsLike, config: ModelConfig | None = None, *, sharded: bool = False) -> ModelConfig:
    """Return the config attached to parameters, or `config` where none is attached; both are checked.

    Args:
        sharded: the leaves are this rank's shards, so shapes are not compared.
    """
    attached = params[CONFIG_KEY] if CONFIG_KEY in params.keys() else None  # noqa: SIM118 (TensorDict has no `in`)
    config = config or attached
    if not isinstance(config, ModelConfig):
        raise ValueError("these parameters have no config attached: pass config=, or use model.with_config")
    if attached is not None and config is not attached and config != attached:
        name = next(f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(attached, f.name))
        raise ValueError(
            f"config has {name}={getattr(config, name)!r}, the one attached to the parameters "
            f"{getattr(attached, name)!r}: omit config="
        )
    if not sharded:
        _check_shapes(params, config)
    return config


def _check_shapes(params: ParamsLike, config: ModelConfig) -> None:
    n_layer = len(params["layers"].keys())
    last = params["layers"][str(n_layer - 1)]["attn"]
    sizes = {
        "n_layer": (n_layer, config.n_layer),
        "n_embd": (params["wte"].shape[1], config.n_embd),
        "padded vocabulary": (params["wte"].shape[0], config.padded_vocab),
        "n_kv_head": (last["value_gate"].shape[0], config.n_kv_head),
        "n_head x head_dim": (last["proj"].shape[1], config.n_head * config.head_dim),
        "n_kv_head x head_dim": (last["value_embed"].shape[1], config.n_kv_head * config.head_dim),
    }
    for name, (actual, expected) in sizes.items():
        if actual != expected:
            raise ValueError(
                f"parameters have {name} {actual}, the config {expected}: pass the config they were made with"
            )


def count(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters per optimizer group, `total`, and `scaling` (matrices and unembedding)."""
    counts: collections.Counter[str] = collections.Counter()
    for row in spec(config).values():
        counts[row.group] += row.numel
    return {**counts, "total": counts.total(), "scaling": counts["matrix"] + counts["unembedding"]}


def flops_per_token(config: ModelConfig, n_time: int | None = None) -> int:
    """Return the forward and backward FLOPs per token of a sequence of `n_time` tokens (default: sequence_len).

    6 per matmul parameter + 12·N·H per key in a layer's window.
    """
    keys = sum(min(window, n_time or config.sequence_len) for window in config.windows)
    return 6 * _matmul_params(config) + 12 * config.n_head * config.head_dim * keys


def decode_flops(config: ModelConfig, context: int) -> int:
    """Return the forward FLOPs of one token that sees `context` tokens: 2 per matmul parameter + 4·N·H per key."""
    keys = sum(min(window, context) for window in config.windows)
    return 2 * _matmul_params(config) + 4 * config.n_head * config.head_dim * keys


def decode_bytes(config: ModelConfig, rows: int, context: int, itemsize: int) -> int:
    """Return the least bytes that a decode step of `rows` tokens reads: all matrices, and each row's keys and values.

    `context` is the number of tokens that a row sees, `itemsize` the bytes of a number of matrices and cache alike.
    """
    cached = 2 * config.n_kv_head * config.head_dim * sum(min(window, context) for window in config.windows)
    return itemsize * (_matmul_params(config) + rows * cached)


def _matmul_params(config: ModelConfig) -> int:
    return sum(row.numel for row in spec(config).values() if row.matmul)
