"""The exponential average of the weights: its formula, over ranks, resumed, switched on and off, as a run."""

import functools
from pathlib import Path
from typing import Any

import pytest
import ranks
import sharded_steps
import tiny_run
import torch
from small_model import CONFIG, assert_trees_close, random_params

from experiments import average
from nanochat import checkpoint, distributed, model, train, tree
from nanochat.config import UserError
from nanochat.distributed import sharding
from nanochat.metrics import logger
from nanochat.train import build

DECAY = 0.8


def test_debiased_average_of_the_steps_that_are_taken():
    state = train.init(random_params(), model.spec(CONFIG))
    state = state._replace(ema=build.init_ema(state.params, None))
    assert_trees_close(build.ema_params(state), state.params)
    update, taken = build.with_ema(train.make_update(donate=True), DECAY, None), []
    for step, value in enumerate((0.1, torch.nan, 0.1, 0.1)):
        grads = tree.map(functools.partial(torch.full_like, fill_value=value), state.params)
        state, _ = update(state, grads, torch.tensor(1.0), torch.tensor(1.0), sharded_steps.hparams(step))
        if value == 0.1:
            taken.append(tree.map(torch.clone, state.params))
        weights = torch.tensor([DECAY**age for age in reversed(range(len(taken)))], dtype=torch.float64)
        for name, got in tree.flatten(build.ema_params(state)).items():
            want = torch.tensordot(
                weights / weights.sum(), torch.stack([tree.flatten(p)[name] for p in taken]).double(), 1
            )
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    assert int(state.ema["steps"]) == 3


def average_after(plan: Any, micro_batches: list[torch.Tensor]) -> dict[str, Any]:
    state, step = sharded_steps.start(plan)
    state = state._replace(ema=build.init_ema(state.params, plan))
    update = build.with_ema(step.keywords["update"], DECAY, plan)
    for number in range(2):
        batches = [sharded_steps.batch(rows) for rows in micro_batches]
        state, _ = step(state, batches, sharded_steps.hparams(number), update=update)
    local = tree.nbytes(sharding.local_shards(state.ema))
    return {
        "average": sharded_steps.full(build.ema_params(state)),
        "bytes": local,
        "last": sharded_steps.full(state.params),
    }


def run_ranks() -> dict[str, float]:
    with distributed.distributed_context("cpu") as runtime:
        rows, results = list(sharded_steps.data()[0]), {}
        alone = average_after(None, [part[r :: runtime.world_size] for part in rows for r in range(runtime.world_size)])
        for mode in ("zero2", "fsdp"):
            plan = sharding.make_plan(sharded_steps.MODES[mode], runtime, model.spec(sharded_steps.CONFIG))
            got = average_after(plan, [part[runtime.rank :: runtime.world_size] for part in rows])
            results[mode] = sharded_steps.difference(got["average"], alone["average"])
            results[f"{mode} moved"] = sharded_steps.difference(got["average"], got["last"])
            results[f"{mode} bytes"] = got["bytes"] / alone["bytes"]
        return results


@pytest.mark.slow
def test_ranks_keep_shards_of_the_average_of_a_single_process():
    for results in ranks.call(2, run_ranks):
        for mode in ("zero2", "fsdp"):
            assert results[mode] < 1e-5 < results[f"{mode} moved"]
            assert results[f"{mode} bytes"] < 0.55


def saved_average(folder: Path) -> Any:
    return checkpoint.load_params(folder / "checkpoints", field="ema.params")[0]


@pytest.mark.slow
def test_run_keeps_it_resumes_it_and_average_makes_it_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with tiny_run.base_folder(tmp_path):
        whole = tiny_run.pretrain_run("train.ema=0.5", "name=whole")
        with tiny_run.stop_after(3):
            tiny_run.pretrain_run("train.ema=0.5", "name=stopped")
        stopped = tiny_run.pretrain_run("train.ema=0.5", "name=stopped", "resume=true")
        tiny_run.assert_same_run(whole, stopped)
        assert_trees_close(saved_average(stopped), saved_average(whole), rtol=0)
        values = {name: logger.curve(logger.read(whole), name) for name in ("val/bpb", "val/bpb_ema")}
        assert values["val/bpb_ema"][0] == values["val/bpb"][0] == [3, 6]
        assert values["val/bpb_ema"][1] != values["val/bpb"][1]

        capsys.readouterr()
        settings: Any = {"tokens": 256, "device_batch_size": 4}
        average.run(average.Config(runs=("whole",), method="ema", **settings), distributed.init("cpu", "float32"))
        out = capsys.readouterr().out
        assert f"{values['val/bpb'][1][-1]:.4f}" in out and f"{values['val/bpb_ema'][1][-1]:.4f}" in out
        assert_trees_close(checkpoint.load("whole_ema", device="cpu").params, saved_average(whole), rtol=0)
        with pytest.raises(UserError, match="method=ema is for one checkpoint, and there are 2"):
            average.run(average.Config(runs=("whole", "stopped"), method="ema"), distributed.init("cpu", "float32"))

        # Off, and on again.
        off = tiny_run.pretrain_run("name=stopped", "num_iterations=7", "resume=true")
        assert "train.ema = 0.0 (was 0.5)" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"has no average of the weights: train with --set train.ema=0.999"):
            average.run(average.Config(runs=("stopped",), method="ema"), distributed.init("cpu", "float32"))
        last = checkpoint.load_params(off / "checkpoints")[0]
        on = tiny_run.pretrain_run("train.ema=0.5", "name=stopped", "num_iterations=8", "resume=true")
        assert "train.ema: the average of the weights starts at step 7" in capsys.readouterr().out
        assert_trees_close(saved_average(on), checkpoint.load_params(on / "checkpoints")[0], rtol=1e-6)
        assert tree.flatten(last)["wte"].ne(tree.flatten(saved_average(on))["wte"]).any()


def test_planner_counts_it():
    shape = model.from_depth(4, sequence_len=64, vocab_size=256)
    for mode, world_size in (("replicate", 1), ("zero2", 4)):
        with_it, without = (
            train.planner.state_bytes(shape, train.planner.Setup(mode, world_size, ema=ema)) for ema in (True, False)
        )
        assert with_it["optimizer"] - without["optimizer"] == without["shards_f32"]
