"""Settings of the optimizer, and the scaling rules: from a model's size to batch, steps, learning rates and decay.

Source: the reference's rules, July 2026; the batch-size exponent is that of arXiv 2505.13738.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nanochat.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Settings, UserError

REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383


@dataclasses.dataclass(frozen=True)
class OptimConfig(Settings):
    """Learning rates before they are scaled by width and batch size, and their schedule.

    Attributes:
        embedding_lr: of the embedding tables. none: the base run's, here and in the next three.
        unembedding_lr: of the output layer.
        matrix_lr: of the matrices, which Muon updates.
        scalar_lr: of the scalars.
        lr_fraction: factor on all learning rates.
        weight_decay: of the matrices; in pretraining at the reference's batch and data size. It falls to 0 in a cosine.
        warmup_steps: linear warm-up of the learning rates.
        warmdown_ratio: last share of the run, over which the learning rates fall linearly.
        final_lr_fraction: of the learning rates, at the end.
        moments: start with the base run's optimizer moments instead of zeros; nothing in pretraining.
    """

    embedding_lr: NonNegativeFloat | None = 0.3
    unembedding_lr: NonNegativeFloat | None = 0.008
    matrix_lr: NonNegativeFloat | None = 0.02
    scalar_lr: NonNegativeFloat | None = 0.5
    lr_fraction: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.28
    warmup_steps: NonNegativeInt = 40
    warmdown_ratio: Fraction = 0.65
    final_lr_fraction: Fraction = 0.05
    moments: bool = False


def learning_rates(config: OptimConfig, base: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the four learning rates by setting; one that is None is the base run's setting, else the default."""
    rates = {}
    for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr"):
        choices = (getattr(config, name), (base or {}).get(f"optim.{name}"), getattr(OptimConfig, name))
        rates[name] = next(value for value in choices if value is not None)
    return rates


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the rules give for one pretraining run."""

    n_embd: int
    train_tokens: int  # D, the tokens that the model's size asks for
    total_batch_size: int  # B, tokens of a step
    num_steps: int
    batch_scale: float  # factor on the learning rates, sqrt(B / B_ref)
    weight_decay: float  # of the matrices, at the first step
    flops_per_token: int  # forward and backward

    @property
    def total_tokens(self) -> int:
        return self.num_steps * self.total_batch_size

    @property
    def total_flops(self) -> float:
        return float(self.flops_per_token) * self.total_tokens


@dataclasses.dataclass(frozen=True)
class FinetunePlan:
    """How the optimizer's settings scale in a run that starts from a checkpoint."""

    n_embd: int
    batch_scale: float = 1.0  # factor on the learning rates
    weight_decay: float = 0.0  # of the matrices, at the first step
    momentum_warmup_steps: int = 0  # over which Muon's momentum rises to 0.95
    lora_lr: float | None = None  # of adapters, if they are trained in place of the model's parameters


def batch_scale(total_batch_size: int) -> float:
    """Return sqrt(B / B_ref), the factor on the learning rates for a step of B tokens."""
    return (total_batch_size / REFERENCE_BATCH_TOKENS) ** 0.5


def plan(
    scaling_params: int,
    reference_params: int,
    flops_per_token: int,
    *,
    n_embd: int,
    target_param_data_ratio: float = 12.0,
    target_flops: float | None = None,
    num_iterations: int | None = None,
    total_batch_size: int | None = None,
    weight_decay: float = 0.28,
) -> Plan:
    """Return batch size, steps, learning-rate factor and weight decay.

    D = ratio·params; B = 2^round(log2(B_ref·(D / D_ref)^0.383)); learning rates × sqrt(B / B_ref);
    decay = base·sqrt(B / B_ref)·D_ref / D; steps = num_iterations, else target_flops / (FLOPs·B), else D / B.

    Args:
        scaling_params, reference_params: matrices and unembedding of this model, and of the same at depth 12.
        flops_per_token: forward and backward.
        target_param_data_ratio: tokens per scaling parameter.
        target_flops, num_iterations, total_batch_size (tokens): given numbers replace the rule's.
        weight_decay: base value, at the reference.
    """
    tokens = target_param_data_ratio * scaling_params
    reference_tokens = target_param_data_ratio * reference_params
    wanted = REFERENCE_BATCH_TOKENS * (tokens / reference_tokens) ** BATCH_EXPONENT
    batch_tokens = total_batch_size or 2 ** round(math.log2(wanted))
    if num_iterations is not None:
        num_steps = num_iterations
    elif target_flops is not None:
        num_steps = round(target_flops / (flops_per_token * batch_tokens))
    else:
        num_steps = int(tokens // batch_tokens)
    if num_steps < 1:
        limit = f"target_flops={target_flops:g}" if target_flops is not None else f"{int(tokens)} tokens in all"
        raise UserError(
            f"total_batch_size={batch_tokens}: one step is more than {limit}; lower it, or set num_iterations"
        )
    scale = batch_scale(batch_tokens)
    decay = weight_decay * scale * reference_tokens / tokens
    return Plan(n_embd, int(tokens), batch_tokens, num_steps, scale, decay, flops_per_token)


def accumulation_steps(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Return the micro-batches of one step: total tokens / (rows per device · tokens per row · ranks)."""
    if device_batch_size < 1:
        raise UserError(f"device_batch_size={device_batch_size}: must be at least 1")
    if total_batch_size % (sequence_len * world_size):
        unit = device_batch_size * sequence_len * world_size
        near = max(round(total_batch_size / unit), 1) * unit
        raise UserError(
            f"total_batch_size={total_batch_size}: not a multiple of sequence_len {sequence_len} x {world_size} "
            f"ranks; set total_batch_size={near}"
        )
    rows = total_batch_size // (sequence_len * world_size)
    if rows % device_batch_size:
        smaller = next(n for n in range(min(device_batch_size, rows), 0, -1) if rows % n == 0)
        raise UserError(
            f"device_batch_size={device_batch_size}: does not divide the {rows} rows that total_batch_size="
            f"{total_batch_size} gives each of {world_size} ranks at sequence_len {sequence_len}; "
            f"set device_batch_size={smaller}"
        )
    return rows // device_batch_size
