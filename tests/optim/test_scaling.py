"""From depth to hyperparameters: the rules' numbers for the four depths that are run, and what is refused."""

import math

import pytest

from nanochat import model, optim
from nanochat.config import UserError
from nanochat.optim import scaling

# Depth: (width, scaling parameters, D = 12 of them, batch in tokens, steps = floor(D / B)). The scaling parameters are
# 12·L·C² + 12·ceil(L/2)·C/128 + 32768·C; the batch is 2^round(19 + 0.383·log2(D / D_12)):
# 19 + 0.383·(0, 1.983, 2.729, 3.060) = 19, 19.759, 20.045, 20.172.
PLANS = {
    12: (768, 110_100_912, 1_321_210_944, 524_288, 2_520),
    20: (1280, 435_160_240, 5_221_922_880, 1_048_576, 4_980),
    24: (1536, 729_810_624, 8_757_727_488, 1_048_576, 8_352),
    26: (1664, 918_423_532, 11_021_082_384, 1_048_576, 10_510),
}


def plan(depth: int, **given: float) -> scaling.Plan:
    shape, reference = model.from_depth(depth), model.from_depth(scaling.REFERENCE_DEPTH)
    params, reference_params = (model.count(c)["scaling"] for c in (shape, reference))
    flops = model.flops_per_token(shape)
    return scaling.plan(params, reference_params, flops, n_embd=shape.n_embd, **given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("depth", PLANS)
def test_plan_by_depth(depth: int):
    width, params, tokens, batch, steps = PLANS[depth]
    assert params == 12 * depth * width**2 + 12 * math.ceil(depth / 2) * width // 128 + 32768 * width
    assert tokens == 12 * params and steps == tokens // batch
    got = plan(depth)
    assert (got.train_tokens, got.total_batch_size, got.num_steps) == (tokens, batch, steps)
    assert got.total_tokens == steps * batch
    assert math.isclose(got.batch_scale, math.sqrt(batch / 2**19))
    assert math.isclose(got.weight_decay, 0.28 * math.sqrt(batch / 2**19) * 110_100_912 / params)
    assert math.isclose(got.total_flops, model.flops_per_token(model.from_depth(depth)) * steps * batch)


def test_learning_rates_scale_with_width_and_batch():
    # base · sqrt(B / 2^19), the embedding tables and the unembedding · (C / 768)^-0.5 besides; C = 1280, B = 2^20
    groups = optim.param_group_settings(optim.OptimConfig(), 1280, batch_scale=plan(20).batch_scale)
    batch, width = 2**0.5, (1280 / 768) ** -0.5
    expected = {"embedding": 0.3 * width, "value_embedding": 0.15 * width, "unembedding": 0.008 * width, "matrix": 0.02}
    expected |= {"x0": 0.5, "resid": 0.005, "smear": 0.2 / batch}  # the smear's is not scaled
    assert {group: h["lr"] for group, h in groups.items()} == pytest.approx({k: v * batch for k, v in expected.items()})


def test_given_numbers_replace_the_rules():
    assert plan(20, num_iterations=7).num_steps == 7
    assert plan(20, num_iterations=7, target_flops=1e30).num_steps == 7, "iterations come before FLOPs"
    flops = model.flops_per_token(model.from_depth(20)) * 2**20
    assert plan(20, target_flops=123.4 * flops).num_steps == 123
    assert plan(20, target_flops=123.6 * flops).num_steps == 124
    given = plan(20, total_batch_size=2**17)
    assert (given.total_batch_size, given.num_steps, given.batch_scale) == (2**17, 5_221_922_880 // 2**17, 0.5)
    assert math.isclose(given.weight_decay, 0.28 * 0.5 * 110_100_912 / 435_160_240)
    double = plan(20, target_param_data_ratio=24.0)
    assert double.train_tokens == 2 * 5_221_922_880
    assert double.total_batch_size == 2**20, "the ratio is in D and in D_ref"
    assert math.isclose(plan(12, weight_decay=0.1).weight_decay, 0.1)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"total_batch_size": 2**31}, "total_batch_size=2147483648: one step is more than 1321210944 tokens in all"),
        ({"target_flops": 1e9}, "total_batch_size=524288: one step is more than target_flops=1e+09; lower it"),
    ],
)
def test_impossible_plans_are_refused(given: dict[str, float], message: str):
    with pytest.raises(UserError) as error:
        plan(12, **given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_accumulation_steps():
    assert scaling.accumulation_steps(524_288, 32, 2048, 8) == 1
    assert scaling.accumulation_steps(524_288, 32, 2048, 1) == 8
    assert scaling.accumulation_steps(3 * 3 * 32 * 2048, 32, 2048, 3) == 3


@pytest.mark.parametrize(
    "batch, rows, length, ranks, message",
    [
        # Whole micro-batches, not only whole rows.
        (500_000, 32, 2048, 1, "total_batch_size=500000: not a multiple of .* 1 ranks; set total_batch_size=524288"),
        (2**19, 32, 2048, 3, f"not a multiple of .* x 3 ranks; set total_batch_size={3 * 3 * 32 * 2048}"),
        (100, 1, 2048, 2, "set total_batch_size=4096"),  # never zero
        (2**19, 24, 2048, 1, "device_batch_size=24: does not divide the 256 rows .*; set device_batch_size=16"),
        (4096, 16, 512, 1, "set device_batch_size=8"),  # no more rows than there are
        (4096, 0, 512, 1, "device_batch_size=0: must be at least 1"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_those_that_do(
    batch: int, rows: int, length: int, ranks: int, message: str
):
    with pytest.raises(UserError, match=f"{message}$"):
        scaling.accumulation_steps(batch, rows, length, ranks)
