"""AdamW and Muon as pure functions: `init` makes the state, `update` returns new parameters and new state.

The state is a TensorDict: `step`, and for every optimizer group the moments of its parameters, so the state itself
says which rule applies to which parameter. Hyperparameters are 0-d tensors: they change every step without recompiling.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree
from nanochat.distributed import MuonAllToAll, ShardingPlan, compile_fn, sharding
from nanochat.model import ParamSpec
from nanochat.optim.schedules import MATRIX, Hparams

OptState = TensorDict
ADAM_EPS = 1e-10
COMPILE_MIN_ELEMENTS = 2**16  # smaller updates are not worth compiling
MAX_STACK_ELEMENTS = 2**28  # of matrices: enough to fill a GPU, and 1 GiB in float32 for each of a few copies

# (a, b, c) of five Polar Express steps. Source: arXiv 2505.16932, 5 iterations, safety 2e-2, cushion 2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Rules(NamedTuple):
    """The two update rules: `adamw` and `muon`, or compiled or in-place versions of them."""

    adamw: Callable[..., tuple[Tensor, Tensor, Tensor]]
    muon: Callable[..., tuple[Tensor, Tensor, Tensor]]


def init(
    params: TensorDict, spec: Mapping[str, ParamSpec], zeros: Callable[[str, torch.Size], Tensor] | None = None
) -> OptState:
    """Return the zero state for `params`: float32 moments, whatever the dtype of the parameters.

    Args:
        spec: the model's table by dotted name; only its groups are read.
        zeros: (parameter, shape of a moment) -> float32 zeros; default: full tensors on the parameters' device.

    Returns:
        {"step": 0-d int64, group: {"m", "v"}} for AdamW, {"momentum", "second"} for Muon, where `second` holds one
        mean square per row (r, 1) where r >= c, else per column (1, c).
    """
    flat = tree.flatten(params)
    device = next(iter(flat.values())).device
    zeros = zeros or (lambda _, shape: torch.zeros(shape, device=device))
    state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    for name, p in flat.items():
        group = spec[name].group
        first, second = _moment_names(group)
        state[f"{group}.{first}.{name}"] = zeros(name, p.shape)
        state[f"{group}.{second}.{name}"] = zeros(name, second_shape(p.shape) if group == MATRIX else p.shape)
    return tree.unflatten(state)


def _moment_names(group: str) -> tuple[str, str]:
    return ("momentum", "second") if group == MATRIX else ("m", "v")


def update(
    grads: TensorDict,
    opt_state: OptState,
    params: TensorDict,
    hparams: Hparams,
    *,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    muon_dtype: torch.dtype | None = None,
    sharding_plan: ShardingPlan | None = None,
) -> tuple[TensorDict, OptState]:
    """Return (new parameters, new state) after one step; the arguments are not changed.

    Args:
        grads: like `params`; with a sharding plan, the shards from `sharding.reduce_`.
        opt_state: from `init` or the last `update`.
        hparams: for each group of the state: lr, beta1, beta2 and weight_decay of AdamW; lr, momentum, beta2 and
            weight_decay of Muon.
        grad_scale: 0-d factor on the gradients.
        skip: 0-d bool; where True, everything stays as it was.
        muon_dtype: dtype of the orthogonalization; None keeps that of the momentum (float32).
        sharding_plan: of several ranks. They exchange matrices for Muon, and full parameters are gathered.
    """
    options: Any = {"grad_scale": grad_scale, "skip": skip, "muon_dtype": muon_dtype, "sharding_plan": sharding_plan}
    if sharding_plan is not None:  # its collectives write in place
        params, opt_state = tree.map(torch.clone, (params, opt_state))
        update_(grads, opt_state, params, hparams, **options)
        return params, opt_state
    new: dict[str, Tensor] = {}
    for names, _, tensors in _results(Rules(adamw, muon), grads, opt_state, params, hparams, **options):
        new.update(zip(names, tensors))
    # In the order of the arguments, whatever the order of the groups.
    new_params = tree.unflatten({name: new[f"params.{name}"] for name in tree.flatten(params)}, params)
    return new_params, tree.unflatten({name: new[name] for name in tree.flatten(opt_state)})


def update_(
    grads: TensorDict,
    opt_state: OptState,
    params: TensorDict,
    hparams: Hparams,
    *,
    rules: Rules | None = None,
    sharding_plan: ShardingPlan | None = None,
    **options: Any,
) -> None:
    """Update `params` and `opt_state` in place; otherwise the same as `update`, whose options it takes.

    Args:
        rules: None for the plain ones, or those of `compiled`.
    """
    rules, full, waits = rules or Rules(adamw_, muon), tree.flatten(params), []
    for names, old, new in _results(rules, grads, opt_state, params, hparams, sharding_plan=sharding_plan, **options):
        for name, before, after in zip(names, old, new):
            if after is not before:
                before.copy_(after)
            if sharding_plan is not None and name.startswith("params."):  # sent while the next ones are computed
                name = name.removeprefix("params.")
                waits.append(sharding.start_all_gather_(sharding_plan, name, full[name]))
        del old, new
    for wait in waits:
        wait()


def compiled() -> Rules:
    """Return the in-place update rules, compiled once for each shape, not for each parameter.

    Small updates stay uncompiled: they take a few kernel launches, and compiling takes seconds.
    """

    return Rules(compiled_if_large(adamw_), compiled_if_large(muon))


def compiled_if_large(rule: Callable[..., Any]) -> Callable[..., Any]:
    fast = compile_fn(rule)
    return lambda p, *rest: (fast if p.numel() >= COMPILE_MIN_ELEMENTS else rule)(p, *rest)


def _results(
    rules: Rules,
    grads: TensorDict,
    opt_state: OptState,
    params: TensorDict,
    hparams: Hparams,
    *,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    muon_dtype: torch.dtype | None = None,
    sharding_plan: ShardingPlan | None = None,
) -> Iterator[tuple[list[str], list[Tensor], list[Tensor]]]:
    """Yield (names, old tensors, new tensors), a few at a time; parameters are named params.<name>."""
    all_to_all: dict[str, MuonAllToAll | None] = {}
    if sharding_plan is not None:
        moments = tree.flatten(opt_state.get((MATRIX, "second"), {}))
        all_to_all = {name: sharding.muon_all_to_all(sharding_plan, name, x.shape) for name, x in moments.items()}
        params, opt_state = sharding.param_shards(sharding_plan, params), sharding.local_shards(opt_state)
    flat_params, flat_grads = tree.flatten(params), tree.flatten(grads)
    step = opt_state["step"] + 1
    for group, h in hparams.items():
        if group not in opt_state.keys():  # noqa: SIM118 (not trained: of the model's groups, adapters have none)
            continue
        labels = ("params", *(f"{group}.{moment}" for moment in _moment_names(group)))
        first, second = (tree.flatten(opt_state[group, moment]) for moment in _moment_names(group))
        for names in _group_by_shape(first, all_to_all) if group == MATRIX else [[name] for name in first]:
            old = [[source[n] for n in names] for source in (flat_params, flat_grads, first, second)]
            if group == MATRIX:
                stacks = (torch.stack(tensors) for tensors in old)
                stacked = rules.muon(*stacks, h, grad_scale, skip, muon_dtype, all_to_all.get(names[0]))
                new = [list(stack.unbind()) for stack in stacked]
                del stacked
            else:
                new = [[x] for x in rules.adamw(*(tensors[0] for tensors in old), step, h, grad_scale, skip)]
            for label, before, after in zip(labels, (old[0], old[2], old[3]), new):
                yield [f"{label}.{name}" for name in names], before, after
            del old, new  # or they would be kept beside the next stack
    yield ["step"], [opt_state["step"]], [step if skip is None else torch.where(skip, opt_state["step"], step)]


def _group_by_shape(matrices: Mapping[str, Tensor], all_to_all: Mapping[str, MuonAllToAll | None]) -> list[list[str]]:
    """Return the names in groups that can be stacked, none of them much over MAX_STACK_ELEMENTS."""
    groups: dict[Any, list[str]] = {}
    for name, matrix in matrices.items():
        groups.setdefault((matrix.shape, all_to_all.get(name)), []).append(name)
    stacks = []
    for (shape, _), names in groups.items():
        n_stacks = max(round(len(names) * shape.numel() / MAX_STACK_ELEMENTS), 1)
        each = -(-len(names) // n_stacks)
        stacks += [names[i : i + each] for i in range(0, len(names), each)]
    return stacks


def adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    h: Mapping[str, Tensor],
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (p, m, v) after one step of AdamW, computed in float32 and returned in the dtypes of the arguments.

    p ← p·(1 - lr·wd); m ← lerp(m, g, 1-β1); v ← lerp(v, g², 1-β2); p ← p - lr·m̂ / (sqrt(v̂) + eps).
    `h` holds lr, beta1, beta2 and weight_decay; `step` counts from 1. Source: arXiv 1711.05101.
    """
    lr, beta1, beta2 = h["lr"], h["beta1"], h["beta2"]
    g32 = g.float() if grad_scale is None else g.float() * grad_scale
    new_m = m + (g32 - m) * (1 - beta1)
    new_v = v + (g32 * g32 - v) * (1 - beta2)
    t = step.float()
    # At 0 the root has no finite derivative (`train.functional.unroll`), and 1e-18 does not show beside eps.
    denominator = (new_v / (1 - beta2**t)).clamp_min(1e-36).sqrt() + ADAM_EPS
    decayed = p.float() * (1 - lr * h["weight_decay"])
    new_p = (decayed - (lr / (1 - beta1**t)) * (new_m / denominator)).to(p.dtype)
    return _where_skipped(skip, (p, m, v), (new_p, new_m.to(m.dtype), new_v.to(v.dtype)))


def adamw_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Update `p`, `m` and `v` in place by `adamw`; return them."""
    for old, new in zip((p, m, v), adamw(p, g, m, v, *rest)):
        old.copy_(new)
    return p, m, v


def muon(
    p: Tensor,
    g: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    h: Mapping[str, Tensor],
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    dtype: torch.dtype | None = None,
    all_to_all: MuonAllToAll | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (p, momentum, second_moment) after one step of Muon, for a stack of matrices of one shape.

    Nesterov momentum, orthogonalized, with its variance reduced and a cautious weight decay:
    p ← p - lr'·u - lr'·wd·p·[u·p ≥ 0], lr' = lr·sqrt(max(1, r/c)).

    Args:
        p, g, momentum: (n, r, c). second_moment: (n, r, 1) or (n, 1, c).
        h: lr, momentum, beta2, weight_decay. dtype: of the orthogonalization; None: float32.
        all_to_all: where all of these are one rank's shards of the matrices.

    Source: https://kellerjordan.github.io/posts/muon/; NorMuon, arXiv 2510.05491.
    """
    g32 = g.float() if grad_scale is None else g.float() * grad_scale
    new_momentum = momentum + (g32 - momentum) * (1 - h["momentum"])
    u = g32 + (new_momentum - g32) * h["momentum"]
    u, new_second = (u if dtype is None else u.to(dtype)), second_moment
    if all_to_all is not None:
        u = all_to_all.gather(u, all_to_all.dim)
        new_second = all_to_all.gather(second_moment, all_to_all.moment_dim)
    rows, columns = u.shape[-2:]
    u, new_second = reduce_variance(orthogonalize(u).float(), new_second, h["beta2"])
    if all_to_all is not None:
        u = all_to_all.scatter(u if dtype is None else u.to(dtype), all_to_all.dim, len(p)).float()
        new_second = all_to_all.scatter(new_second, all_to_all.moment_dim, len(p))
    lr = h["lr"] * max(1.0, rows / columns) ** 0.5
    p32 = p.float()
    decay = p32 * ((u * p32) >= 0) * h["weight_decay"]
    new_p = (p32 - lr * (u + decay)).to(p.dtype)
    return _where_skipped(skip, (p, momentum, second_moment), (new_p, new_momentum, new_second))


Three = tuple[Tensor, Tensor, Tensor]


def _where_skipped(skip: Tensor | None, old: Three, new: Three) -> Three:
    if skip is None:
        return new
    p, first, second = (torch.where(skip, before, after) for before, after in zip(old, new))
    return p, first, second


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


def reduced_axis(shape: Sequence[int]) -> int:
    """Return the axis that the variance is averaged over: columns (-1) where r >= c, else rows (-2)."""
    return -1 if shape[-2] >= shape[-1] else -2


def second_shape(shape: Sequence[int]) -> torch.Size:
    """Return the shape of Muon's second moment of a matrix or a stack of them."""
    *stack, r, c = shape
    return torch.Size([*stack, r, 1] if reduced_axis(shape) == -1 else [*stack, 1, c])


def reduce_variance(u: Tensor, second_moment: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
    """Return (u, second_moment): `u` with rows or columns divided by their running root mean square, its norm kept.

    u: (n, r, c) float32. second_moment: running mean squares, (n, r, 1) or (n, 1, c). Source: arXiv 2510.05491.
    """
    axis = reduced_axis(u.shape)
    size = u.shape[axis]
    mean_square = u.square().mean(axis, keepdim=True)
    second_moment = second_moment + (mean_square - second_moment) * (1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = (size * mean_square.sum((-2, -1), keepdim=True)).sqrt()
    after = (size * mean_square * scale.square()).sum((-2, -1), keepdim=True).sqrt()
    return u * (scale * (before / after.clamp_min(1e-10))), second_moment
