"""Schedules as pure functions of the step: plain floats in, plain floats out.

Source: the reference's schedules, as of July 2026.
"""

import math


def learning_rate(
    step: int, num_steps: int, *, warmup_steps: int = 40, warmdown_ratio: float = 0.65, final: float = 0.05
) -> float:
    """Return the learning-rate factor: linear warm-up, flat, then linear to `final` over the last `warmdown_ratio`.

    Args:
        step: 0 … num_steps - 1. num_steps: length of the run. warmup_steps: step s < warmup has (s + 1) / warmup.
    """
    warmdown = round(warmdown_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_steps - warmdown:
        return 1.0
    left = (num_steps - step) / warmdown
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


def flat_then_linear(done: float, warmdown_ratio: float) -> float:
    """Return the learning-rate factor of fine-tuning: 1, then linear to 0 over the last `warmdown_ratio` of the run.

    Args:
        done: share of the run that is done, 0 … 1.
    """
    return min((1 - done) / warmdown_ratio, 1.0) if warmdown_ratio > 0 else 1.0


def short_momentum(step: int) -> float:
    """Return Muon's momentum in fine-tuning: 0.85 → 0.95 over 300 steps, then 0.95."""
    return 0.85 + 0.10 * min(step / 300, 1.0)


def weight_decay(step: int, num_steps: int) -> float:
    """Return the factor of Muon's weight decay: cosine from 1 to 0 over the run."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))
