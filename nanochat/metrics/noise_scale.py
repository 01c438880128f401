"""The gradient noise scale while training: how large a batch still pays, without another backward pass.

The squared norms of gradients of B_small tokens (a micro-batch) and of B_big tokens (the step) estimate, without bias,

    |G|² = (B_big |G_big|² - B_small |G_small|²) / (B_big - B_small)    of the gradient over all data
    S    = (|G_small|² - |G_big|²) / (1 / B_small - 1 / B_big)          of its noise: trace of a token's covariance

A single step says little, and the mean of ratios is biased, so both are averaged over steps before they are divided.
S / |G|² is the critical batch in tokens: steps of that size need twice the fewest steps, and twice the fewest tokens.

Source: arXiv 1812.06162, appendix A.1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import distributed, tree
from nanochat.config import UserError
from nanochat.distributed import ShardingPlan
from nanochat.metrics import logger
from nanochat.text import format_count

BETA = 0.99  # of the averages: over about the last hundred measurements
GRAD_SQUARE, TRACE, TOKENS = "noise_scale/grad_square", "noise_scale/trace", "noise_scale/tokens"

Averages = tuple[Sequence[float], Sequence[float]]  # of |G|² and S, see `logger.ema`


def check(every: int, stage: str, micro_batches: int, sharding_plan: ShardingPlan | None) -> None:
    """Raise a UserError unless the steps of a stage can be measured.

    Args:
        every: `metrics.noise_scale_every`. micro_batches: of a step, on each rank.
    """
    if every and stage in ("rl", "dpo"):  # sorted by length, they are not samples of one distribution
        raise UserError(
            f"metrics.noise_scale_every={every}: micro-batches of {stage.upper()} hold answers of different lengths, "
            "and so their gradients do not estimate one; set it to 0"
        )
    if every and micro_batches * _groups(sharding_plan) < 2:
        where = "reduces its gradients over all ranks at once" if sharding_plan else "is computed on one rank"
        raise UserError(
            f"metrics.noise_scale_every={every}: a step is one micro-batch, which {where}, and the noise shows only "
            "between several: halve device_batch_size, or double total_batch_size"
        )


def measured(
    train_step: Callable[..., Any], value_and_grad: Callable[..., Any], sharding_plan: ShardingPlan | None
) -> Callable[..., Any]:
    """Return `train_step` whose metrics have |G|² and S, unless the step was skipped. It waits for the device.

    Args:
        train_step: `train.train_step` with its functions bound. value_and_grad: the one that it uses.
    """

    def step(state: Any, batches: Sequence[Any], hparams: Any) -> tuple[Any, dict[str, Any]]:
        squares: list[Tensor] = []

        def recorded(params: Any, batch: Any, scale: Tensor) -> Any:
            grads, aux = value_and_grad(params, batch, scale)
            squares.append(grad_square(grads, sharding_plan) / scale.square())  # before it is added to the others
            return grads, aux

        state, metrics = train_step(state, batches, hparams, value_and_grad=recorded)
        if not metrics["finite"]:
            return state, metrics
        small = float(torch.stack(squares).cpu().double().mean())
        tokens, number = batches[0]["inputs"].numel(), len(squares)
        if sharding_plan is not None:
            small = distributed.all_reduce_sum([small])[0] / sharding_plan.ranks
            tokens *= sharding_plan.ranks // _groups(sharding_plan)
            number *= _groups(sharding_plan)
        true, trace = estimates(small, float(metrics["grad_norm"]) ** 2, tokens, number * tokens)
        return state, metrics | {GRAD_SQUARE: true, TRACE: trace}

    return step


def estimates(small: float, big: float, small_tokens: float, big_tokens: float) -> tuple[float, float]:
    """Return unbiased estimates of (|G|², S) from the mean |G_small|² and from |G_big|²."""
    grad_square = (big_tokens * big - small_tokens * small) / (big_tokens - small_tokens)
    return grad_square, (small - big) / (1 / small_tokens - 1 / big_tokens)


def averaged(before: Averages | None, metrics: Mapping[str, float]) -> tuple[Averages | None, dict[str, float]]:
    """Return the averages after a step, and {TOKENS: critical batch}; {} before the first measurement.

    The critical batch is infinite where |G|² is too small beside the noise to be seen.
    """
    if GRAD_SQUARE in metrics:
        old = before or (None, None)
        before = (logger.ema(old[0], metrics[GRAD_SQUARE], BETA)[0], logger.ema(old[1], metrics[TRACE], BETA)[0])
    if not before:
        return None, {}
    (grad_square, _), (trace, _) = before
    return before, {TOKENS: max(trace, 0.0) / grad_square if grad_square > 0 else float("inf")}


def describe(tokens: float, step_tokens: float) -> str:
    """Return what a critical batch means for steps of `step_tokens`, as text."""
    if not math.isfinite(tokens):
        return f"above what can be seen with steps of {format_count(step_tokens)} tokens"
    cost = (
        f"{1 + step_tokens / max(tokens, 1):.2f} x the fewest tokens, {1 + tokens / step_tokens:.2f} x the fewest steps"
    )
    return f"{format_count(tokens)} tokens; steps of {format_count(step_tokens)} take {cost}"


def grad_square(grads: Any, sharding_plan: ShardingPlan | None) -> Tensor:
    """Return the squared norm of the gradient of a micro-batch, float32, before it is reduced over the ranks.

    Where each layer is gathered within the gradient, it is reduced already: the micro-batch is that of all ranks which
    share a copy of the state. A collective call there.
    """
    flat = tree.flatten(grads)
    if sharding_plan is None or _groups(sharding_plan) == sharding_plan.ranks:
        return _square(flat.values())
    group, device = sharding_plan.mesh.get_group("shard"), next(iter(flat.values())).device
    square = _square([g for name, g in flat.items() if name in sharding_plan.sharded]).to(device)
    dist.all_reduce(square, group=group)
    if own := [g.float().flatten() for name, g in flat.items() if name not in sharding_plan.sharded]:
        small = torch.cat(own)
        dist.all_reduce(small, group=group)
        square += _square([small])
    return square / sharding_plan.shards**2


def _square(tensors: Any) -> Tensor:
    norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]
    return torch.stack(norms).square().sum() if norms else torch.zeros(())


def _groups(sharding_plan: ShardingPlan | None) -> int:
    """Return how many gradients of a micro-batch there are."""
    if sharding_plan is None:
        return 1
    return sharding_plan.ranks if sharding_plan.full_in_step else sharding_plan.replicas
