"""The difference in bits per byte between two models, or two groups of them, with a confidence interval.

Both models are measured on the same pieces of text, and the difference is taken piece by piece: most of the noise of a
piece (is it easy or hard?) is common to both and cancels. With n_i nats and b_i bytes in each of N pieces, and d_i the
nats of the second model minus those of the first,

    difference R = Σ d_i / (ln 2 · Σ b_i),   variance = N / (N - 1) · Σ (d_i - R ln 2 b_i)² / (ln 2 · Σ b_i)²,

the ratio estimator (Cochran, Sampling Techniques, chapter 6). It covers the choice of validation text, and nothing
else. Runs with several seeds a side add the variance between seeds; degrees of freedom after Welch and Satterthwaite.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A difference (second minus first, in bits per byte) with its confidence interval at `LEVEL`."""

    difference: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.low <= 0 <= self.high


def paired_difference(nats_a: np.ndarray, nats_b: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return (difference b - a in bits per byte, its standard error over pieces of text).

    Args:
        nats_a, nats_b: (N,) summed loss of each piece.
        sizes: (N,) bytes of each piece.
    """
    n, scale = len(sizes), math.log(2) * float(sizes.sum())
    if n < 2:
        raise ValueError(f"a standard error needs at least two pieces of text, not {n}")
    differences = nats_b - nats_a
    ratio = float(differences.sum()) / scale
    residuals = differences - ratio * math.log(2) * sizes
    return ratio, math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) / scale


def interval(values_a: Sequence[float], values_b: Sequence[float], text_error: float, pieces: int) -> Interval:
    """Return the difference between the means of two groups of runs, with its interval.

    Each group has its own variance (Welch); a group of one run is assumed to vary as much as the other. With one run
    on either side, the interval covers the choice of text alone.

    `text_error` is the standard error from `paired_difference`, over so many `pieces` of text.
    """
    counts = len(values_a), len(values_b)
    variances = [(text_error**2, pieces - 1)]  # (variance of the mean, degrees of freedom)
    if min(counts) > 1:
        variances += [(statistics.variance(v) / len(v), len(v) - 1) for v in (values_a, values_b)]
    elif max(counts) > 1:
        variance = statistics.variance(max(values_a, values_b, key=len))
        variances.append((variance * (1 / counts[0] + 1 / counts[1]), max(counts) - 1))
    total = sum(variance for variance, _ in variances)
    spread = sum(variance**2 / freedom for variance, freedom in variances)
    difference = statistics.fmean(values_b) - statistics.fmean(values_a)
    low, high = difference, difference
    if spread:
        low, high = scipy.stats.t.interval(LEVEL, df=total**2 / spread, loc=difference, scale=math.sqrt(total))
    return Interval(difference, float(low), float(high))


def interpolate_log(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """Return the value at `x` of a curve, interpolated over log x between its points; None outside of them."""
    if not xs or not xs[0] * (1 - 1e-9) <= x <= xs[-1] * (1 + 1e-9):
        return None
    return float(np.interp(math.log(x), np.log(xs), ys))
