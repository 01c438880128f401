"""Schedules as pure functions of the step: plain floats in, plain floats out.

Source: the reference's pretraining schedules, as of July 2026.
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


def weight_decay(step: int, num_steps: int) -> float:
    """Return the factor of Muon's weight decay: cosine from 1 to 0 over the run."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))
