"""Schedules at their corners, by hand."""

import math

import pytest

from nanochat.optim import FinetunePlan, OptimConfig, Plan, learning_rates, schedules

# 1000 steps: warm-up 0 … 39, flat until step 350, then 650 steps down.
RATES = {0: 1 / 40, 1: 2 / 40, 38: 39 / 40, 39: 1, 40: 1, 349: 1, 350: 1, 351: 649 / 650 + 0.05 / 650, 675: 0.525}
RATES |= {999: 1 / 650 + 649 / 650 * 0.05}


def test_learning_rate():
    assert {step: schedules.learning_rate(step, 1000) for step in RATES} == pytest.approx(RATES, rel=1e-12)
    flat = [schedules.learning_rate(s, 10, warmup_steps=0, warmdown_ratio=0.0) for s in range(10)]
    assert flat == [1.0] * 10
    to_zero = [schedules.learning_rate(s, 10, warmup_steps=0, warmdown_ratio=0.2, final=0.0) for s in range(10)]
    assert to_zero == [1.0] * 9 + [0.5]
    # A run shorter than the warm-up never leaves it.
    assert [schedules.learning_rate(s, 3) for s in range(3)] == [1 / 40, 2 / 40, 3 / 40]
    assert schedules.learning_rate(0, 1, warmup_steps=0) == 1.0


# 2000 steps: up to 400, flat until 700, then 1300 steps down.
MOMENTA = {0: 0.85, 1: 0.8503, 100: 0.88, 200: 0.91, 399: 0.9697, 400: 0.97, 699: 0.97, 700: 0.97, 1350: 0.935}
MOMENTA |= {1999: 0.90 + 0.07 / 1300}


def test_muon_momentum():
    assert {step: schedules.muon_momentum(step, 2000) for step in MOMENTA} == pytest.approx(MOMENTA, rel=1e-12)
    # 600 steps: the way down would begin at 210, but the first 400 steps go up.
    assert math.isclose(schedules.muon_momentum(300, 600), 0.94)
    assert math.isclose(schedules.muon_momentum(400, 600), 0.97 - 0.07 * 190 / 390)
    assert math.isclose(schedules.muon_momentum(599, 600), 0.97 - 0.07 * 389 / 390)
    assert schedules.muon_momentum(500, 600, warmdown_ratio=0.0) == 0.97


def test_weight_decay_is_a_half_cosine():
    factors = {0: 1.0, 250: 0.5 + math.sqrt(0.5) / 2, 500: 0.5, 750: 0.5 - math.sqrt(0.5) / 2, 1000: 0.0}
    for step, factor in factors.items():
        assert math.isclose(schedules.weight_decay(step, 1000), factor, abs_tol=1e-12)


def test_fine_tuning_is_flat_then_falls_to_zero():
    factors = [schedules.finetune_learning_rate(0, done, warmdown_ratio=0.5) for done in (0.0, 0.5, 0.75, 1.0)]
    assert factors == [1.0, 1.0, 0.5, 0.0]
    assert schedules.finetune_learning_rate(0, 0.9, warmdown_ratio=0.2) == pytest.approx(0.5)
    assert schedules.finetune_learning_rate(0, 1.0, warmdown_ratio=0.0) == 1.0
    assert schedules.finetune_learning_rate(1, 0.1, warmup_steps=4) == 0.5
    assert schedules.finetune_learning_rate(0, 1.0, final=0.1) == 0.1
    momenta = [schedules.finetune_momentum(step, 300) for step in (0, 150, 300, 900)]
    assert momenta == pytest.approx([0.85, 0.90, 0.95, 0.95]) and schedules.finetune_momentum(0, 0) == 0.95


def numbers(config: OptimConfig, plan: Plan | FinetunePlan, step: int, done: float | None = None) -> dict[str, float]:
    groups = schedules.hparams(config, plan, step, done)
    return {f"{group}.{name}": round(float(x), 7) for group, row in groups.items() for name, x in row.items()}


def test_hparams_of_pretraining():
    plan = Plan(768, 10**9, 2**19, 1000, batch_scale=2.0, weight_decay=0.1, flops_per_token=1)
    got = numbers(OptimConfig(), plan, 20)
    assert got["matrix.lr"] == 0.021 and got["embedding.lr"] == 0.315  # 21 of 40 warm-up steps
    assert got["matrix.momentum"] == 0.856 and got["matrix.weight_decay"] == 0.0999013
    half = numbers(OptimConfig(lr_fraction=0.5), plan, 20)
    assert {n for n in got if half[n] != got[n]} == {n for n in got if n.endswith(".lr")}
    assert half["matrix.lr"] == 0.0105


def test_hparams_of_fine_tuning():
    config = OptimConfig(lr_fraction=0.5, weight_decay=0.2, warmup_steps=0, warmdown_ratio=1.0, final_lr_fraction=0.0)
    got = numbers(config, FinetunePlan(768, weight_decay=0.2), 10, done=0.5)
    assert got["matrix.lr"] == 0.005 and got["smear.lr"] == 0.05 and got["matrix.momentum"] == 0.95
    assert got["matrix.weight_decay"] == pytest.approx(0.1)


def test_a_learning_rate_of_none_is_inherited():
    config, base = OptimConfig(embedding_lr=None, matrix_lr=None, scalar_lr=0.0), {"optim.matrix_lr": 0.5}
    expected = {"embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.5, "scalar_lr": 0.0}
    assert learning_rates(config, base) == expected
    assert schedules.param_group_settings(config, 768)["embedding"]["lr"] == 0.3
