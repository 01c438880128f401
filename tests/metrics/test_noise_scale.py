"""The gradient noise scale: against per-example gradients, over ranks and micro-batches, resumed, refused."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import sharded_steps
import tiny_run
import torch
from small_model import random_params

from nanochat import distributed, model, train, tree
from nanochat.config import UserError
from nanochat.distributed import sharding
from nanochat.metrics import logger, noise_scale, report, run_folder

ONE_LAYER = dataclasses.replace(sharded_steps.CONFIG, n_layer=1)
SHAPE = model.ModelConfig(sequence_len=8, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=32)


def rows_of(step: int, rows: int) -> torch.Tensor:
    """Rows of a skewed language: something to learn, and noise."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, 10, (rows, 1), generator=generator)
    steps = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), rows * SHAPE.sequence_len, True, generator=generator)
    return torch.cat([first, first + steps.view(rows, -1).cumsum(1)], 1) % SHAPE.vocab_size


def measured_step(loss_fn: Any, plan: Any = None) -> Any:
    value_and_grad = train.gradient(loss_fn)
    step = functools.partial(train.train_step, value_and_grad=value_and_grad, update=train.make_update(donate=True))
    return noise_scale.measured(step, value_and_grad, plan)


@pytest.mark.parametrize(
    "micro_rows, steps, tolerance", [(1, 3, 1e-3), pytest.param(4, 200, 0.1, marks=pytest.mark.slow)]
)
def test_equals_the_value_from_per_example_gradients(micro_rows: int, steps: int, tolerance: float):
    loss_fn = functools.partial(model.loss.next_token, config=SHAPE)
    f = functools.partial(loss_fn, compute=model.Compute(attend=model.attention.math))
    per_row = torch.func.vmap(torch.func.grad(lambda p, row: f(p, sharded_steps.batch(row[None]))[0]), (None, 0))
    state = train.init(random_params(SHAPE, noise=0.02), model.spec(SHAPE))
    step, hparams, n_rows = measured_step(loss_fn), sharded_steps.hparams(20), 16
    averages = expected = None
    for number in range(steps):
        rows = rows_of(number, n_rows)
        grads = torch.cat([g.flatten(1) for g in tree.leaves(per_row(state.params, rows))], 1).double()
        variance = float(grads.var(0).sum())
        mean_square = float(grads.mean(0).square().sum()) - variance / n_rows
        values = {noise_scale.GRAD_SQUARE: mean_square, noise_scale.TRACE: variance * SHAPE.sequence_len}
        expected, want = noise_scale.averaged(expected, values)
        state, metrics = step(state, [sharded_steps.batch(part) for part in rows.split(micro_rows)], hparams)
        averages, got = noise_scale.averaged(averages, metrics)
        if number >= 150 or micro_rows == 1:
            assert got[noise_scale.TOKENS] == pytest.approx(want[noise_scale.TOKENS], rel=tolerance), number
            assert 10 < got[noise_scale.TOKENS] < 10_000


def measure(plan: Any, micro_batches: list[torch.Tensor]) -> list[float]:
    state, step = sharded_steps.start(plan, config=ONE_LAYER)
    step = noise_scale.measured(step, step.keywords["value_and_grad"], plan)
    _, metrics = step(state, [sharded_steps.batch(rows) for rows in micro_batches], sharded_steps.hparams(0))
    return [metrics[noise_scale.GRAD_SQUARE], metrics[noise_scale.TRACE]]


def run_ranks() -> dict[str, list[float]]:
    """Return what a step of two micro-batches measures in each mode, and with the same rows in a single process."""
    with distributed.distributed_context("cpu") as runtime:
        micro_batches, results, ranks = list(sharded_steps.data()[0]), {}, range(runtime.world_size)
        for mode in ("zero2", "fsdp"):
            plan = sharding.make_plan(sharded_steps.MODES[mode], runtime, model.spec(ONE_LAYER))
            results[mode] = measure(plan, [rows[runtime.rank :: runtime.world_size] for rows in micro_batches])
        results["each rank"] = measure(None, [rows[r :: runtime.world_size] for rows in micro_batches for r in ranks])
        results["all ranks"] = measure(None, micro_batches)
        return results


@pytest.mark.slow
def test_ranks_count_as_micro_batches_and_sharded_gradients_as_larger_ones():
    first, second = ranks.call(2, run_ranks)
    for mode, got in first.items():
        assert got == pytest.approx(second[mode], rel=1e-6)
        same = mode if mode.startswith(("each", "all")) else "all ranks" if mode == "fsdp" else "each rank"
        assert got == pytest.approx(first[same], rel=1e-3), mode
    assert first["each rank"] != pytest.approx(first["all ranks"], rel=1e-3)


@pytest.mark.slow
def test_resumed_run_has_the_numbers_of_an_unbroken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = ("device_batch_size=2", "metrics.noise_scale_every=2")
    with tiny_run.base_folder(tmp_path):
        whole = tiny_run.pretrain_run(*settings, "name=whole")
        with tiny_run.stop_after(3):
            tiny_run.pretrain_run(*settings, "name=stopped")
        stopped = tiny_run.pretrain_run(*settings, "name=stopped", "resume=true")
        tiny_run.assert_same_run(whole, stopped)
        assert (
            tiny_run.saved_state(whole)[1]["progress"]["noise"] == tiny_run.saved_state(stopped)[1]["progress"]["noise"]
        )
        steps, values = logger.curve(logger.read(stopped), noise_scale.TOKENS)
        assert steps == [2, 3, 4, 5, 6] and values[0] == values[1] != values[2]
        assert logger.curve(logger.read(stopped), noise_scale.TRACE)[0] == [2, 4, 6]
        assert "critical batch: " in capsys.readouterr().out
        page = report.write([run_folder.read_run(stopped)], {}, None).read_text()
        assert "| critical batch, BASE | " in page and "gradient noise scale" in page


def test_one_micro_batch_is_refused_before_anything_is_written(tmp_path: Path):
    with tiny_run.base_folder(tmp_path):
        with pytest.raises(
            UserError, match=r"a step is one micro-batch, which is computed on one rank.*device_batch_size"
        ):
            tiny_run.pretrain_run("device_batch_size=8", "metrics.noise_scale_every=1")
        assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="micro-batches of RL hold answers of different lengths"):
        noise_scale.check(1, "rl", 4, None)


def test_loss_scale_and_skipped_steps():
    loss_fn = functools.partial(model.loss.next_token, config=SHAPE)
    step, hparams, results = measured_step(loss_fn), sharded_steps.hparams(1), []
    batches = [sharded_steps.batch(rows) for rows in rows_of(0, 8).split(2)]
    for scale in (1.0, 1024.0, math.inf):
        state = train.init(random_params(SHAPE), model.spec(SHAPE))
        state.scaler["scale"].fill_(scale)
        results.append(step(state, batches, hparams)[1])
    assert results[0][noise_scale.TRACE] == pytest.approx(results[1][noise_scale.TRACE], rel=1e-3)
    assert noise_scale.TRACE not in results[2]
    assert noise_scale.averaged(None, {}) == (None, {})
    huge = {noise_scale.GRAD_SQUARE: -1.0, noise_scale.TRACE: 2.0}
    assert noise_scale.averaged(None, huge)[1] == {noise_scale.TOKENS: math.inf}
    assert "above what can be seen" in noise_scale.describe(math.inf, 100)
