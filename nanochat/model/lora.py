"""Low-rank adapters (LoRA): a tree of their own beside a frozen base, and `merge`, which makes a model of the two.

An adapter of the matrix W (out, in) is a (r, in) and b (out, r), and the model computes with

    W + alpha / r · b @ a

so any loss of the model is a loss of the adapters: `loss(merge(base, adapters), batch)`. b is zero at first, and the
merged model is the base.
Source: LoRA (arXiv 2106.09685).
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from nanochat import tree
from nanochat.config import UserError, nearest
from nanochat.model import params as model
from nanochat.model.params import ModelConfig, ParamsLike, ParamSpec

SCALE_KEY = "lora_scale"  # of the non-tensor data in adapters: alpha / r


def spec(config: ModelConfig, rank: int, targets: Sequence[str]) -> dict[str, ParamSpec]:
    """Return the table of the adapters, {<target>.a, <target>.b: row}, as `model.spec` does for the model.

    Args:
        targets: names of matrices, or patterns with * for any text. Raises UserError for one that names none.
    """
    matrices = {name: row for name, row in model.spec(config).items() if row.matmul}
    for pattern in targets:
        if not fnmatch.filter(matrices, pattern):
            raise UserError(f"lora.targets={pattern}: no matrix has such a name{nearest(pattern, matrices)}")
    rows = {}
    for name, row in matrices.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in targets):
            (n_out, n_in), (out, into) = row.shape, row.axes
            group = "unembedding" if row.group == "unembedding" else "matrix"  # the rule that the matrix itself has
            rows[f"{name}.a"] = ParamSpec((rank, n_in), ("rank", into), model.normal(n_in**-0.5), group)
            rows[f"{name}.b"] = ParamSpec((n_out, rank), (out, "rank"), model.constant(0.0), group)
    return rows


def init(
    config: ModelConfig, seed: int, rank: int, targets: Sequence[str], *, alpha: float = 16.0, **options: Any
) -> TensorDict:
    """Return adapters in float32 with which `merge` gives the base; `options` are those of `model.init`."""
    adapters = model.init_rows(spec(config, rank, targets), seed, **options)
    return with_scale(model.with_config(adapters, config), alpha, rank)


def with_scale(adapters: TensorDict, alpha: float, rank: int) -> TensorDict:
    """Return the adapters with the factor on their products attached, as `model.with_config` attaches the config."""
    return adapters.copy().set_non_tensor(SCALE_KEY, alpha / max(rank, 1))


def merge(base: ParamsLike, adapters: ParamsLike) -> Any:
    """Return the model's parameters, of the type and with the dtypes of `base`; differentiable in both arguments.

    A target is a new tensor, made by one matrix product in the dtype of the base's; the others are the base's.
    """
    flat, low_rank, scale = tree.flatten(base), tree.flatten(adapters), adapters[SCALE_KEY]
    for name in [name.removesuffix(".a") for name in low_rank if name.endswith(".a")]:
        a, b = (low_rank[f"{name}.{part}"].to(flat[name].dtype) for part in "ab")
        flat[name] = torch.addmm(flat[name], b, a, alpha=scale)
    return tree.unflatten(flat, base) if isinstance(base, TensorDictBase) else tree.nest(flat)
