"""The statistics of paired differences against simulations and printed tables."""

import math

import numpy as np
import pytest

from nanochat.eval import significance


def texts(draws: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nats of two models and bytes of n pieces; difficulty varies ten times as much as the models differ."""
    sizes = draws.integers(200, 2000, n).astype(float)
    difficulty = draws.normal(0.7, 0.2, n)
    a = sizes * (difficulty + draws.normal(0, 0.02, n))
    b = sizes * (difficulty - 0.01 + draws.normal(0, 0.02, n))
    return a, b, sizes


def test_standard_error_equals_a_bootstrap():
    draws = np.random.default_rng(0)
    a, b, sizes = texts(draws, 400)
    difference, error = significance.paired_difference(a, b, sizes)
    scale = math.log(2) * sizes.sum()
    assert difference == pytest.approx(b.sum() / scale - a.sum() / scale)
    again = []
    for _ in range(2000):
        chosen = draws.integers(0, 400, 400)
        again.append((b - a)[chosen].sum() / sizes[chosen].sum() / math.log(2))
    assert error == pytest.approx(np.std(again), rel=0.08)
    alone = a / sizes / math.log(2)
    assert error < 0.2 * alone.std() / math.sqrt(400), "pairing removes most of the noise"


def test_interval_covers_the_truth_at_its_level():
    draws = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        a, b, sizes = texts(draws, 60)
        difference, error = significance.paired_difference(a, b, sizes)
        result = significance.interval([0.0], [difference], error, 60)
        covered += result.low <= -0.01 / math.log(2) <= result.high
    assert 0.93 < covered / 600 < 0.97


@pytest.mark.parametrize(("runs_a", "runs_b"), [(3, 3), (1, 4), (2, 5)])
def test_interval_of_several_seeds_covers_seeds_and_text(runs_a: int, runs_b: int):
    draws = np.random.default_rng(2)
    truth, seed_noise, covered, tries = 0.003, 0.004, 0, 600
    for _ in range(tries):
        text = draws.normal(0, 0.002)  # what the choice of text adds to all differences
        a = list(1.0 + draws.normal(0, seed_noise, runs_a))
        b = list(1.0 + truth + text + draws.normal(0, seed_noise, runs_b))
        result = significance.interval(a, b, 0.002, 400)
        covered += result.low <= truth <= result.high
    assert 0.92 < covered / tries <= 0.995, "Welch's approximation is a few points off for groups of two or three"


def test_seeds_widen_the_interval():
    one = significance.interval([1.0], [1.01], 0.002, 100)
    several = significance.interval([1.0, 1.004, 0.996], [1.01, 1.006, 1.014], 0.002, 100)
    assert one.difference == pytest.approx(several.difference) and one.is_significant
    assert several.low < one.low
    equal = significance.interval([1.0], [1.0], 0.0, 100)
    assert (equal.difference, equal.low, equal.high, equal.is_significant) == (0, 0, 0, False)


def test_interpolation_is_over_log_x_and_not_beyond_the_ends():
    xs, ys = [1.0, 100.0], [3.0, 1.0]
    assert significance.interpolate_log(xs, ys, 10.0) == pytest.approx(2.0)
    assert significance.interpolate_log(xs, ys, 100.0) == pytest.approx(1.0)
    assert significance.interpolate_log(xs, ys, 101.0) is significance.interpolate_log(xs, ys, 0.5) is None
    assert significance.interpolate_log([], [], 1.0) is None


def test_one_piece_of_text_is_refused():
    with pytest.raises(ValueError, match="at least two pieces"):
        significance.paired_difference(np.ones(1), np.ones(1), np.ones(1))
