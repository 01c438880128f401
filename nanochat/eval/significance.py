"""How two models, or two groups of them, differ in bits per byte, and how sure that is.

Both are measured on the same pieces of text, rows of the validation data or documents, and what counts is the
difference piece by piece: most of the noise of a piece (is it easy or hard?) is common to both and drops out. With nats
n_i and bytes b_i of piece i, and d_i = n_i of one less n_i of the other,

    difference R = Σ d_i / (ln 2 · Σ b_i),   variance = n / (n - 1) · Σ (d_i - R ln 2 b_i)² / (ln 2 · Σ b_i)²,

the usual estimate for a ratio of sums. It covers which text the validation data happen to hold, and nothing else. How
much another seed would change a run is seen from several runs a side, whose variances are added.
Source: ratio estimator (Cochran, Sampling Techniques, chapter 6); degrees of freedom after Welch and Satterthwaite.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.model import Compute, ModelConfig, Params, loss

LEVEL = 0.95


class Interval(NamedTuple):
    """A difference with its confidence interval, at `LEVEL`.

    Attributes:
        difference: second less first, bits per byte. low, high: the interval.
        text_error, seed_error: standard errors: of the choice of text, and of the seeds (None: of one run a side).
    """

    difference: float
    low: float
    high: float
    text_error: float
    seed_error: float | None

    @property
    def told(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0 <= self.high


def paired(nats_a: np.ndarray, nats_b: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return (difference b - a in bits per byte, its standard error over pieces of text).

    Args:
        nats_a, nats_b: (n,) summed loss of each piece. sizes: (n,) its bytes.

    Raises:
        ValueError: fewer than two pieces.
    """
    n, scale = len(sizes), math.log(2) * float(sizes.sum())
    if n < 2:
        raise ValueError(f"a standard error needs two pieces of text or more, not {n}")
    differences = nats_b - nats_a
    ratio = float(differences.sum()) / scale
    residuals = differences - ratio * math.log(2) * sizes
    return ratio, math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) / scale


def interval(
    values_a: Sequence[float], values_b: Sequence[float], text_error: float, pieces: int, level: float = LEVEL
) -> Interval:
    """Return the difference of the means of two groups of runs, with its interval.

    The seeds' variance is that of each group (Welch); where a group is a single run, it is taken to vary as the other
    does. With one run on either side there is none to be had, and the interval is of the text alone.

    Args:
        values_a, values_b: bits per byte of each run. text_error, pieces: of the difference, from `paired`.
    """
    parts = [(text_error**2, pieces - 1)]  # variance of the mean, degrees of freedom
    counts = [len(values_a), len(values_b)]
    if min(counts) > 1:
        parts += [(statistics.variance(v) / len(v), len(v) - 1) for v in (values_a, values_b)]
    elif max(counts) > 1:
        variance = statistics.variance(max(values_a, values_b, key=len))
        parts.append((variance * (1 / counts[0] + 1 / counts[1]), max(counts) - 1))
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / freedom for variance, freedom in parts)
    freedom = total**2 / spread if spread else math.inf
    difference = statistics.fmean(values_b) - statistics.fmean(values_a)
    reach = t_quantile(freedom, level) * math.sqrt(total)
    seeds = math.sqrt(sum(variance for variance, _ in parts[1:])) if len(parts) > 1 else None
    return Interval(difference, difference - reach, difference + reach, text_error, seeds)


def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """Return t such that a Student variable with so many degrees of freedom lies within ±t with probability `level`.

    By bisection on Simpson's integral of the density; right to six digits.
    """
    if freedom > 1e6:
        return statistics.NormalDist().inv_cdf((1 + level) / 2)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2

    def within(t: float) -> float:
        # x = sinh(u): the density's tail is long where there are few degrees of freedom.
        u = np.linspace(0.0, math.asinh(t), 401)
        density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(np.sinh(u) ** 2 / freedom)) * np.cosh(u)
        weights = np.where(np.arange(401) % 2, 4.0, 2.0)
        weights[[0, -1]] = 1.0
        return 2 * float((weights * density).sum()) * (u[1] - u[0]) / 3

    low, high = 0.0, 1.0
    while within(high) < level:
        high *= 2
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return high


def at(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """Return the curve's value at `x`, interpolated over log x between its points; None outside of them."""
    if not xs or not xs[0] * (1 - 1e-9) <= x <= xs[-1] * (1 + 1e-9):
        return None
    return float(np.interp(math.log(x), np.log(xs), ys))


@torch.no_grad()
def piece_nats(
    params: Params,
    batches: Iterable[Mapping[str, Tensor]],
    token_bytes_V: Tensor,
    config: ModelConfig,
    compute: Compute,
    chunk_tokens: int = 8192,
) -> list[list[Any]]:
    """Return [nats, bytes] of every row of the batches, over the targets that stand for bytes of text.

    Args:
        params, config, compute: as for `model.apply`. batches: {"inputs", "targets"} of (B, T) ids; -1 does not count.
        token_bytes_V: (V,) int64, bytes that each token stands for. chunk_tokens: whose logits live at once.
    """
    found = []
    for batch in batches:
        targets = batch["targets"]
        sizes = token_bytes_V[targets.clamp_min(0)] * (targets != loss.IGNORE)
        nats = loss.per_token(params, batch, config=config, compute=compute, chunk_tokens=chunk_tokens)
        nats = torch.where(sizes > 0, nats.double(), 0.0)
        found += [list(pair) for pair in zip(nats.sum(1).tolist(), sizes.sum(1).tolist())]
    return found
