"""Hyperparameters of every step: what the settings and the plan give each optimizer group, under its schedule.

Source: the reference's schedules, as of July 2026.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nanochat.optim.scaling import FinetunePlan, OptimConfig, Plan, learning_rates

Hparams = Mapping[str, Mapping[str, Tensor]]  # group -> name -> 0-d float32 tensor
MATRIX = "matrix"  # the group that Muon updates; AdamW has the others
SMEAR_LR = 0.2  # has no setting
FINETUNE_MOMENTUM = 0.95


def hparams(config: OptimConfig, plan: Plan | FinetunePlan, step: int, done: float | None = None) -> Hparams:
    """Return the hyperparameters of one step for every optimizer group, as `update` takes them.

    `done` is the share of the run that is done, 0 … 1, for a FinetunePlan, which does not know how long the run is.
    """
    groups = param_group_settings(config, plan.n_embd, batch_scale=plan.batch_scale, weight_decay=plan.weight_decay)
    matrix = groups[MATRIX]
    shape = {"warmup_steps": config.warmup_steps, "warmdown_ratio": config.warmdown_ratio}
    if isinstance(plan, Plan):
        factor = learning_rate(step, plan.num_steps, **shape, final=config.final_lr_fraction)
        matrix["momentum"] = muon_momentum(step, plan.num_steps, warmdown_ratio=config.warmdown_ratio)
        matrix["weight_decay"] *= weight_decay(step, plan.num_steps)
    else:
        assert done is not None
        factor = finetune_learning_rate(step, done, **shape, final=config.final_lr_fraction)
        matrix["momentum"] = finetune_momentum(step, plan.momentum_warmup_steps)
        matrix["weight_decay"] *= weight_decay(done, 1)
    for group in groups.values():
        group["lr"] *= config.lr_fraction * factor
    if isinstance(plan, FinetunePlan) and plan.lora_lr is not None:
        matrix["lr"] = groups["unembedding"]["lr"] = plan.lora_lr * factor
    return as_hparams(groups)


def param_group_settings(
    config: OptimConfig, n_embd: int, *, batch_scale: float = 1.0, weight_decay: float | None = None
) -> dict[str, dict[str, float]]:
    """Return the hyperparameters of every group, before any schedule.

    Learning rates of embeddings scale with the width C as (C / 768)^-0.5, and all but the smear's with `batch_scale`,
    sqrt(batch / reference batch). `weight_decay` is of the matrices; the config's where it is None.
    """
    lr, width = learning_rates(config), (n_embd / 768) ** -0.5
    decay = config.weight_decay if weight_decay is None else weight_decay

    def adamw(lr: float, beta1: float, beta2: float, weight_decay: float) -> dict[str, float]:
        return {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay}

    return {
        "unembedding": adamw(lr["unembedding_lr"] * width * batch_scale, 0.8, 0.96, 0.01),
        "embedding": adamw(lr["embedding_lr"] * width * batch_scale, 0.8, 0.995, 0.001),
        "value_embedding": adamw(0.5 * lr["embedding_lr"] * width * batch_scale, 0.8, 0.995, 0.01),
        "resid": adamw(0.01 * lr["scalar_lr"] * batch_scale, 0.8, 0.95, 0.05),
        "x0": adamw(lr["scalar_lr"] * batch_scale, 0.96, 0.95, 0.0),
        "smear": adamw(SMEAR_LR, 0.8, 0.95, 0.0),
        MATRIX: {
            "lr": lr["matrix_lr"] * batch_scale, "momentum": FINETUNE_MOMENTUM, "beta2": 0.9, "weight_decay": decay
        },
    }  # fmt: skip


def as_hparams(groups: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Tensor]]:
    """Return the settings of all groups as 0-d float32 tensors on the CPU."""
    return {group: {k: torch.tensor(v, dtype=torch.float32) for k, v in row.items()} for group, row in groups.items()}


def learning_rate(
    step: int, num_steps: int, *, warmup_steps: int = 40, warmdown_ratio: float = 0.65, final: float = 0.05
) -> float:
    """Return the learning-rate factor: linear warm-up, flat, then linear to `final` over the last `warmdown_ratio`."""
    warmdown = round(warmdown_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_steps - warmdown:
        return 1.0
    left = (num_steps - step) / warmdown
    return left + (1 - left) * final


def finetune_learning_rate(
    step: int, done: float, *, warmup_steps: int = 0, warmdown_ratio: float = 0.5, final: float = 0.0
) -> float:
    """Return `learning_rate` for a run that is known by the share of it that is done, 0 … 1."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = min((1 - done) / warmdown_ratio, 1.0) if warmdown_ratio > 0 else 1.0
    return left + (1 - left) * final


def muon_momentum(step: int, num_steps: int, *, warmdown_ratio: float = 0.65) -> float:
    """Return Muon's momentum: 0.85 → 0.97 over 400 steps, then 0.97, then → 0.90 over the last `warmdown_ratio`."""
    warmdown = round(warmdown_ratio * num_steps)
    start = num_steps - warmdown
    if step < 400:
        return 0.85 + 0.12 * step / 400
    if step < start:
        return 0.97
    return 0.97 - 0.07 * (step - start) / warmdown


def finetune_momentum(step: int, warmup_steps: int) -> float:
    """Return Muon's momentum: 0.85 → 0.95 over `warmup_steps`, then 0.95."""
    return 0.85 + 0.10 * min(step / warmup_steps, 1.0) if warmup_steps else FINETUNE_MOMENTUM


def weight_decay(step: float, num_steps: int) -> float:
    """Return the factor of Muon's weight decay: cosine from 1 to 0 over the run."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))
