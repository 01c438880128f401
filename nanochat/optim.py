"""AdamW and Muon as pure functions: `init` makes the state, `update` returns new parameters and new state.

The state is a TensorDict: `step`, and for every optimizer group the moments of its parameters, so the state itself
says which rule applies to which parameter. Hyperparameters are 0-d tensors: they change every step, and a compiled
update does not recompile for that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree

OptState = TensorDict
Hparams = Mapping[str, Mapping[str, Tensor]]  # group -> name -> 0-d float32 tensor
MATRIX = "matrix"  # the group that Muon updates; AdamW has the others

# (a, b, c) of five Polar Express steps. Source: arXiv 2505.16932, 5 iterations, safety 2e-2, cushion 2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Row(Protocol):
    """What `init` needs of a row of the model's table."""

    @property
    def group(self) -> str:
        """Name of the optimizer group."""
        ...


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Base learning rates, before they are scaled by width and batch size; see `rates`.

    Attributes:
        embedding_lr, unembedding_lr, matrix_lr, scalar_lr: of the tables, the output layer, the matrices, the scalars.
        weight_decay: of the matrices, at the reference's batch and data size.
        warmup_steps, warmdown_ratio, final_lr_fraction: the learning-rate schedule.
    """

    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float = 0.28
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_fraction: float = 0.05


def rates(
    config: OptimConfig, n_embd: int, *, batch_scale: float = 1.0, weight_decay: float | None = None
) -> dict[str, dict[str, float]]:
    """Return the hyperparameters of every group, before any schedule.

    Args:
        config: base rates. n_embd: the width C, by which the rates of the tables scale as (C / 768)^-0.5.
        batch_scale: sqrt(batch / reference batch), by which all rates but the smear's are multiplied.
        weight_decay: of the matrices; the config's where it is None.
    """
    width = (n_embd / 768) ** -0.5
    decay = config.weight_decay if weight_decay is None else weight_decay

    def adamw(lr: float, beta1: float, beta2: float, weight_decay: float) -> dict[str, float]:
        return {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay}

    return {
        "unembedding": adamw(config.unembedding_lr * width * batch_scale, 0.8, 0.96, 0.01),
        "embedding": adamw(config.embedding_lr * width * batch_scale, 0.8, 0.995, 0.001),
        "value_embedding": adamw(0.5 * config.embedding_lr * width * batch_scale, 0.8, 0.995, 0.01),
        "resid": adamw(0.01 * config.scalar_lr * batch_scale, 0.8, 0.95, 0.05),
        "x0": adamw(config.scalar_lr * batch_scale, 0.96, 0.95, 0.0),
        "smear": adamw(0.2, 0.8, 0.95, 0.0),
        MATRIX: {"lr": config.matrix_lr * batch_scale, "momentum": 0.95, "beta2": 0.9, "weight_decay": decay},
    }


def as_hparams(rates: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Tensor]]:
    """Return `rates` with every number as a 0-d float32 tensor on the CPU, as `update` takes them."""
    return {
        group: {k: torch.tensor(v, dtype=torch.float32) for k, v in row.items()} for group, row in rates.items()
    }


def init(params: TensorDict, spec: Mapping[str, Row]) -> OptState:
    """Return the zero state for `params`: float32 moments, whatever the parameters are stored in.

    Args:
        params: nested TensorDict. spec: the model's table by dotted name; only its groups are read.

    Returns:
        {"step": 0-d int64, group: {"m", "v"}} for AdamW, {"momentum", "second"} for Muon, where `second` holds one
        mean square per row (r, 1) or per column (1, c), whichever are fewer numbers reduced over the longer side.
    """
    flat = tree.flatten(params)
    device = next(iter(flat.values())).device
    state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    for name, p in flat.items():
        group = spec[name].group
        zeros = torch.zeros_like(p, dtype=torch.float32)
        if group == MATRIX:
            state[f"{group}.momentum.{name}"] = zeros
            state[f"{group}.second.{name}"] = zeros.narrow(reduced_axis(p.shape), 0, 1).clone()
        else:
            state[f"{group}.m.{name}"] = zeros
            state[f"{group}.v.{name}"] = torch.zeros_like(zeros)
    return tree.unflatten(state)


def update(
    grads: TensorDict,
    opt_state: OptState,
    params: TensorDict,
    hparams: Hparams,
    *,
    muon_dtype: torch.dtype | None = None,
) -> tuple[TensorDict, OptState]:
    """Return (new parameters, new state) after one step; the arguments are not changed.

    Args:
        grads: like `params`. opt_state: from `init` or the last `update`.
        hparams: for each group of the state: lr, beta1, beta2 and weight_decay of AdamW; lr, momentum, beta2 and
            weight_decay of Muon.
        muon_dtype: dtype of the orthogonalisation; None keeps that of the momentum (float32).
    """
    flat_params, flat_grads = tree.flatten(params), tree.flatten(grads)
    step = opt_state["step"] + 1
    new_params: dict[str, Tensor] = {}
    new_state: dict[str, Tensor] = {"step": step}
    for group, h in hparams.items():
        if group == MATRIX:
            momentum, second = (tree.flatten(opt_state[group, part]) for part in ("momentum", "second"))
            for names in _by_shape(momentum):
                p, buf, v = muon(
                    torch.stack([flat_params[n] for n in names]),
                    torch.stack([flat_grads[n] for n in names]),
                    torch.stack([momentum[n] for n in names]),
                    torch.stack([second[n] for n in names]),
                    h,
                    dtype=muon_dtype,
                )
                for i, name in enumerate(names):
                    new_params[name] = p[i]
                    new_state[f"{group}.momentum.{name}"], new_state[f"{group}.second.{name}"] = buf[i], v[i]
        else:
            ms, vs = (tree.flatten(opt_state[group, part]) for part in ("m", "v"))
            for name in ms:
                new_params[name], new_state[f"{group}.m.{name}"], new_state[f"{group}.v.{name}"] = adamw(
                    flat_params[name], flat_grads[name], ms[name], vs[name], step, h
                )
    ordered_params = {name: new_params[name] for name in flat_params}
    ordered_state = {name: new_state[name] for name in tree.flatten(opt_state)}
    return tree.unflatten(ordered_params), tree.unflatten(ordered_state)


def _by_shape(matrices: Mapping[str, Tensor]) -> list[list[str]]:
    shapes: dict[torch.Size, list[str]] = {}
    for name, matrix in matrices.items():
        shapes.setdefault(matrix.shape, []).append(name)
    return list(shapes.values())


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, h: Mapping[str, Tensor], eps: float = 1e-10
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (p, m, v) after one step of AdamW, computed in float32 and returned in the dtype of `p`.

    p ← p·(1 - lr·wd); m ← lerp(m, g, 1-β1); v ← lerp(v, g², 1-β2); p ← p - lr·m̂ / (sqrt(v̂) + eps).
    `step` counts from 1. Source: arXiv 1711.05101.
    """
    lr, beta1, beta2 = h["lr"], h["beta1"], h["beta2"]
    p32, g32 = p.float(), g.float()
    m = m + (g32 - m) * (1 - beta1)
    v = v + (g32 * g32 - v) * (1 - beta2)
    t = step.float()
    denominator = (v / (1 - beta2**t)).sqrt() + eps
    p32 = p32 * (1 - lr * h["weight_decay"]) - (lr / (1 - beta1**t)) * (m / denominator)
    return p32.to(p.dtype), m, v


def muon(
    p: Tensor,
    g: Tensor,
    momentum: Tensor,
    second: Tensor,
    h: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (p, momentum, second) after one step of Muon, for a stack of matrices of one shape.

    Nesterov momentum, orthogonalised, with its variance reduced and a cautious weight decay:
    p ← p - lr'·u - lr'·wd·p·[u·p ≥ 0], lr' = lr·sqrt(max(1, r/c)).

    Args:
        p, g, momentum: (n, r, c). second: (n, r, 1) or (n, 1, c).
        h: lr, momentum, beta2, weight_decay as 0-d tensors. dtype: of the orthogonalisation.

    Source: https://kellerjordan.github.io/posts/muon/; NorMuon, arXiv 2510.05491.
    """
    rows, columns = p.shape[-2:]
    lr = h["lr"] * max(1.0, rows / columns) ** 0.5
    g = g.float()
    momentum = momentum + (g - momentum) * (1 - h["momentum"])
    u = g + (momentum - g) * h["momentum"]
    u = orthogonalize(u if dtype is None else u.to(dtype)).float()
    u, second = reduce_variance(u, second, h["beta2"])
    p32 = p.float()
    decay = p32 * ((u * p32) >= 0) * h["weight_decay"]
    return (p32 - lr * (u + decay)).to(p.dtype), momentum, second


def orthogonalize(x: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrices to a stack (n, r, c), scaled to Frobenius norm sqrt(min(r, c)).

    Rows are first brought to equal norms; then five Polar Express steps push all singular values towards one.
    Source: arXiv 2505.16932.
    """
    rows, columns = x.shape[-2:]
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x * (norm / rows**0.5 / x.norm(dim=-1, keepdim=True).clamp_min(1e-6))
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = rows > columns
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x * (min(rows, columns) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))


def reduced_axis(shape: torch.Size | tuple[int, ...]) -> int:
    """Return the axis that the variance is averaged over: the longer one, columns (-1) when square."""
    return -1 if shape[-2] >= shape[-1] else -2


def reduce_variance(u: Tensor, second: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
    """Return (u, second): `u` with rows or columns divided by their running root mean square, its norm kept.

    Args:
        u: (n, r, c) float32. second: running mean squares, (n, r, 1) or (n, 1, c). beta2: 0-d.

    Source: NorMuon, arXiv 2510.05491.
    """
    axis = reduced_axis(u.shape)
    size = u.shape[axis]
    mean_square = u.square().mean(axis, keepdim=True)
    second = second + (mean_square - second) * (1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    before = (size * mean_square.sum((-2, -1), keepdim=True)).sqrt()
    after = (size * mean_square * scale.square()).sum((-2, -1), keepdim=True).sqrt()
    return u * (scale * (before / after.clamp_min(1e-10))), second


Update = Callable[[TensorDict, OptState, TensorDict, Hparams], tuple[TensorDict, OptState]]
