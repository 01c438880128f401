"""`fit`: plans that the planner's memory holds, what is kept of given settings, refusals, and the presets."""

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch

from experiments import _fit, plan, pretrain, speedrun, speedrun_1gpu, speedrun_8gb
from nanochat import distributed, train
from nanochat.config import UserError, override
from nanochat.distributed import Runtime
from nanochat.train import planner

GPU = Runtime(0, 0, 1, 1, 0, torch.device("cpu"), torch.bfloat16)  # a plan for a GPU, made without one


def planned(*settings: str) -> tuple[_fit.Fitted, pretrain.Config]:
    config = override(pretrain.Config(), settings)
    resolve = lambda depth: pretrain.resolve(dataclasses.replace(config, depth=depth), None)  # noqa: E731
    capacity = _fit.size_bytes(str(config.fit))
    return _fit.largest(config, train.planner_setup(config, GPU), capacity, resolve), config


@pytest.mark.parametrize(("fit", "least"), [("2gb", 4), ("8gb", 12), ("12gb", 16), ("24gb", 22), ("80gb", 34)])
def test_largest_model_fits_by_the_planner_and_the_next_does_not(fit: str, least: int):
    fitted, config = planned(f"fit={fit}")
    made = override(config, [f"{name}={value}" for name, value in fitted.settings().items()])
    shape, run = pretrain.resolve(made, None)
    memory = planner.memory(
        shape,
        train.planner_setup(made, GPU),
        rows=made.rows,
        micro_batches=run.total_batch_size // (made.rows * shape.sequence_len),
    )
    assert memory == fitted.choice.memory and memory.total <= 0.95 * float(fit.removesuffix("gb")) * 1e9
    assert shape.n_layer >= least
    with pytest.raises(UserError, match=rf"depth {shape.n_layer + 1} with a batch of 1 x 2048 tokens needs"):
        planned(f"fit={fit}", f"depth={shape.n_layer + 1}")


def test_given_settings_stay_and_frugal_ones_only_where_they_are_needed():
    fitted, _ = planned("fit=24gb", "depth=8")
    assert fitted.settings() == {
        "depth": 8, "device_batch_size": 32, "train.memory_budget": 1.0, "train.embedding_moments": "float32"
    }  # fmt: skip
    given = ("depth=10", "device_batch_size=2", "train.memory_budget=0.8", "train.embedding_moments=bfloat16")
    fitted, _ = planned("fit=8gb", *given)
    assert [f"{name}={value}" for name, value in fitted.settings().items()] == list(given)
    deeper, _ = planned("fit=8gb", "device_batch_size=4")
    assert deeper.choice.rows == 4 and deeper.shape.n_layer < planned("fit=8gb")[0].shape.n_layer


def test_below_depth_4_is_refused_with_the_numbers_and_what_is_enough():
    with pytest.raises(
        UserError, match=r"fit=1gb: depth 4 .* needs 1\.\d\d GiB \(parameters 0\.\d\d, .* 0\.88 of 0\.93"
    ):
        planned("fit=1gb")
    with pytest.raises(UserError) as refused:
        planned("fit=1gb")
    enough = re.search(r"set fit=([\d.]+gib)", str(refused.value))
    assert enough and planned(f"fit={enough[1]}")[0].shape.n_layer == 4


@pytest.mark.parametrize("fit", ["8", "8tb", "0gb", "-1gb", "gb", "nangb", "0.0gib", "large"])
@pytest.mark.parametrize("experiment", [pretrain, plan])
def test_fit_is_a_size_or_auto(experiment: Any, fit: str):
    with pytest.raises(UserError, match=r"fit='?.*: must be auto, or a size above 0 such as 8gb"):
        override(experiment.config(), [f"fit={fit}"])


def test_auto_asks_for_a_depth_on_a_cpu_and_takes_the_free_memory_of_other_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(distributed, "free_bytes", lambda *_: 8 * 10**9)
    with pytest.raises(UserError, match=r"fit=auto: on a CPU time is the limit, not the 7.5 GiB .* set depth"):
        pretrain.run(override(pretrain.Config(), ["fit=auto"]), GPU)
    mps = dataclasses.replace(GPU, device=torch.device("mps"))
    chosen = pretrain.fitted(override(pretrain.Config(), ["fit=auto"]), None, mps)
    assert chosen.depth == planned("fit=8gb")[0].shape.n_layer
    assert re.search(r"fit=auto: 7.08 GiB of 7.45 .*\n  model +depth \d+, [\d,]+ parameters", capsys.readouterr().out)


def test_plan_offers_the_command_that_pretrain_chooses_itself(capsys: pytest.CaptureFixture[str]):
    plan.run(override(plan.config(), ["fit=8gb"]), GPU)
    out = capsys.readouterr().out
    command = re.findall(r"--set (\S+=\S+)", out.splitlines()[-1])
    assert "on 1 x rtx3070, at 50% MFU" in out and "bits per byte  no estimate" in out
    offered = override(pretrain.Config(), command)
    chosen = pretrain.fitted(override(pretrain.Config(), ["fit=8gb"]), None, GPU)
    assert dataclasses.replace(chosen, fit=None) == offered
    capsys.readouterr()
    with pytest.raises(UserError, match=r"fit=auto: this device \(cpu\) is not in the table of GPUs"):
        plan.run(override(plan.config(), ["fit=auto"]), GPU)
    plan.run(override(plan.config(), ["fit=auto", "gpu=t4", "depth=6"]), GPU)
    assert "fit=auto: 13.87 GiB of 14.60 GiB" in capsys.readouterr().out


def test_table_of_gpus_names_what_trains_within_the_hours(capsys: pytest.CaptureFixture[str]):
    plan.run(override(plan.config(), ["hours=2"]), GPU)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    depths = {row[0]: int(re.findall(r"depth=(\d+)", row[2])[0]) for row in rows}
    assert depths["1 x rtx3070"] <= depths["1 x rtx4090"] < depths["1 x h100"] < depths["8 x h100"]
    for *_, time in rows:
        assert re.fullmatch(r"1h\d\dm|2h00m|\d+m\d\ds", time), time
    with pytest.raises(UserError, match=r"hours=0\.0001: no GPU of the table trains depth 4 in that time"):
        plan.run(override(plan.config(), ["hours=0.0001"]), GPU)


@pytest.mark.parametrize(("preset", "gpus"), [(speedrun_1gpu, ("rtx4090", "rtx3090")), (speedrun_8gb, ("rtx3070",))])
def test_presets_fit_and_take_the_time_that_they_name(preset: Any, gpus: tuple[str, ...]):
    config: speedrun.Config = preset.config()
    resolve = functools.partial(lambda depth: pretrain.resolve(dataclasses.replace(config.pretrain, depth=depth), None))
    capacity = _fit.size_bytes(str(config.pretrain.fit))
    fitted = _fit.largest(config.pretrain, train.planner_setup(config.pretrain, GPU), capacity, resolve)
    text = preset.__doc__.replace("\n", " ")
    facts = [f"depth {fitted.shape.n_layer}", f"{fitted.plan.total_tokens:,} tokens", f"name={config.name}"]
    assert all(fact in f"{text} name={preset.__name__.split('.')[1]}" for fact in facts)
    for gpu in gpus:
        assert _fit.duration(fitted, gpu, 0.5) in text


@pytest.mark.parametrize(
    ("dtype", "fp8", "forward_mib", "backward_mib"),
    [
        (torch.bfloat16, False, 1299.8, 912.0),
        (torch.bfloat16, True, 1430.9, 857.9),
        (torch.float32, False, 2500.1, 1608.1),
        (torch.float32, True, 2559.1, 1538.1),
    ],
)
def test_recomputed_step_within_ten_percent_of_traced_one(
    dtype: torch.dtype, fp8: bool, forward_mib: float, backward_mib: float
):
    setup = planner.Setup(dtype=dtype, fp8=fp8, memory_budget=0.75)
    shape = pretrain.resolve(pretrain.Config(depth=8), None)[0]
    names = ("activations", "logits", "weights", "gradients")
    for phase, traced in zip(planner.phases(shape, setup, rows=4, micro_batches=1), (forward_mib, backward_mib)):
        assert traced <= sum(phase.parts[name] for name in names) / 2**20 <= 1.1 * traced
    # So few tokens that they take less than the parameters: torch recomputes nothing then.
    short = dataclasses.replace(shape, sequence_len=256)
    exact = planner.Setup(dtype=dtype, fp8=fp8)
    assert planner.memory(short, setup, rows=1, micro_batches=1) == planner.memory(
        short, exact, rows=1, micro_batches=1
    )
