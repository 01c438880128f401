"""Comparing runs: the statistics against simulations and tables, and the experiment on tiny runs."""

import math

import numpy as np
import pytest

from nanochat import compare


@pytest.mark.parametrize(
    ("freedom", "t"),
    # From printed tables of Student's t, two-sided 95%.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (120, 1.980), (math.inf, 1.960)],
)
def test_the_quantiles_are_those_of_the_tables(freedom: float, t: float) -> None:
    assert compare.t_quantile(freedom) == pytest.approx(t, abs=6e-4)


def test_quantiles_at_another_level_and_between_whole_numbers() -> None:
    assert compare.t_quantile(5, 0.99) == pytest.approx(4.032, abs=6e-4)
    assert compare.t_quantile(4, 0.95) > compare.t_quantile(4.5, 0.95) > compare.t_quantile(5, 0.95)


def texts(draws: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nats of two models and bytes of n pieces whose hardness varies ten times as much as the models differ."""
    sizes = draws.integers(200, 2000, n).astype(float)
    hardness = draws.normal(0.7, 0.2, n)
    a = sizes * (hardness + draws.normal(0, 0.02, n))
    b = sizes * (hardness - 0.01 + draws.normal(0, 0.02, n))
    return a, b, sizes


def test_the_difference_is_that_of_bits_per_byte_and_its_error_that_of_a_bootstrap() -> None:
    draws = np.random.default_rng(0)
    a, b, sizes = texts(draws, 400)
    difference, error = compare.paired(a, b, sizes)
    scale = math.log(2) * sizes.sum()
    assert difference == pytest.approx(b.sum() / scale - a.sum() / scale)
    again = []
    for _ in range(2000):
        chosen = draws.integers(0, 400, 400)
        again.append((b - a)[chosen].sum() / sizes[chosen].sum() / math.log(2))
    assert error == pytest.approx(np.std(again), rel=0.08)
    alone = a / sizes / math.log(2)
    assert error < 0.2 * alone.std() / math.sqrt(400), "pairs take most of the noise out"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        a, b, sizes = texts(draws, 60)
        difference, error = compare.paired(a, b, sizes)
        found = compare.interval([0.0], [difference], error, 60)
        held += found.low <= -0.01 / math.log(2) <= found.high
        assert found.seed_error is None
    assert 0.93 < held / 1000 < 0.97


@pytest.mark.parametrize(("runs_a", "runs_b"), [(3, 3), (1, 4), (2, 5)])
def test_with_several_seeds_the_interval_covers_seeds_and_text(runs_a: int, runs_b: int) -> None:
    draws = np.random.default_rng(2)
    truth, seed_noise, held, tries = 0.003, 0.004, 0, 1500
    for _ in range(tries):
        text = draws.normal(0, 0.002)  # what the choice of text adds to all differences alike
        a = list(1.0 + draws.normal(0, seed_noise, runs_a))
        b = list(1.0 + truth + text + draws.normal(0, seed_noise, runs_b))
        found = compare.interval(a, b, 0.002, 400)
        held += found.low <= truth <= found.high
    # Welch's approximation is known to be a few points off where a group has two or three.
    assert 0.92 < held / tries <= 0.995


def test_seeds_widen_the_interval() -> None:
    one = compare.interval([1.0], [1.01], 0.002, 100)
    several = compare.interval([1.0, 1.004, 0.996], [1.01, 1.006, 1.014], 0.002, 100)
    assert one.difference == pytest.approx(several.difference) and one.told
    assert several.low < one.low and several.seed_error == pytest.approx(math.sqrt(2 * 0.004**2 / 3))
    equal = compare.interval([1.0], [1.0], 0.0, 100)
    assert (equal.difference, equal.low, equal.high, equal.told) == (0, 0, 0, False)


def test_interpolation_is_over_the_logarithm_and_never_beyond_the_ends() -> None:
    xs, ys = [1.0, 100.0], [3.0, 1.0]
    assert compare.at(xs, ys, 10.0) == pytest.approx(2.0)
    assert compare.at(xs, ys, 100.0) == pytest.approx(1.0)
    assert compare.at(xs, ys, 101.0) is None and compare.at(xs, ys, 0.5) is None and compare.at([], [], 1.0) is None


def test_two_pieces_are_the_least() -> None:
    with pytest.raises(ValueError, match="two pieces"):
        compare.paired(np.ones(1), np.ones(1), np.ones(1))
