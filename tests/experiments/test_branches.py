"""Runs that resume from a chosen step, and runs that branch from a step of another, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import assert_same_run, losses, pretrain_config, pretrain_run, saved_state, saved_steps, stop_after

from experiments import pretrain, sft
from nanochat import checkpoint, distributed, train
from nanochat.config import UserError, base_dir, override
from nanochat.metrics import logger, run_folder

pytestmark = pytest.mark.usefixtures("corpus")
SETTINGS = ("checkpoint.every_steps=1", "checkpoint.keep_last=none")


@pytest.fixture(scope="module")
def whole(corpus: Path) -> Path:
    """An uninterrupted run of six steps with a checkpoint of each."""
    return pretrain_run("name=whole", *SETTINGS)


@pytest.mark.parametrize("name", ["back", "back_without_flag"])
def test_run_resumed_from_a_chosen_step_equals_the_uninterrupted_one(whole: Path, name: str, capsys):
    folder = whole.with_name(name)
    shutil.copytree(whole, folder)
    flag = ["resume=true"] * (name == "back")
    resumed = pretrain_run(f"name={name}", *SETTINGS, *flag, "resume_step=2")
    old = folder / "checkpoints.old"
    assert f"the checkpoints after step 2 (3, 4, 5, 6) are kept in {old}" in capsys.readouterr().out
    assert saved_steps(resumed) == [1, 2, 3, 4, 5, 6] and checkpoint.steps(old) == [3, 4, 5, 6]
    assert_same_run(whole, resumed)
    assert (folder / "metrics.1.jsonl").read_text() == (whole / logger.FILE).read_text(), "nothing is lost"


def test_step_without_checkpoint_is_refused_with_those_there_are(whole: Path):
    before = (saved_steps(whole), losses(whole))
    with pytest.raises(UserError, match=r"no checkpoint of step 9 in .*; there are steps 1, 2, 3, 4, 5, 6"):
        pretrain_run("name=whole", "resume=true", "resume_step=9")
    with pytest.raises(UserError, match=r"run=.*/never: no such run"):
        pretrain_run("name=never", "resume_step=9")
    assert (saved_steps(whole), losses(whole)) == before and not train.run_folder("never").exists()


def test_restart_by_torchrun_does_not_go_back_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train.init_from, "was_restarted", lambda key: key == "opened x")
    here = distributed.Runtime(0, 0, 1, 1, 1, torch.device("cpu"), torch.float32)
    config = train.resume_after_restart(pretrain_config("resume_step=2"), "x", here)
    assert config.resume and config.resume_step is None


def test_branch_with_the_same_settings_equals_the_unbroken_run(whole: Path):
    branch = pretrain_run("name=same", "init_from=whole@3", *SETTINGS)
    assert_same_run(whole, branch)
    assert (
        saved_steps(branch) == [4, 5, 6] and json.loads((branch / "config.json").read_text())["init_from"] == "whole@3"
    )
    assert run_folder.read_run(branch).done and saved_steps(whole) == [1, 2, 3, 4, 5, 6]


def test_branch_is_resumed_without_its_base(whole: Path):
    shutil.copytree(whole, whole.with_name("gone"))
    with stop_after(5):
        pretrain_run("name=orphan", "init_from=gone@3", *SETTINGS)
    shutil.rmtree(whole.with_name("gone"))
    branch = pretrain_run("name=orphan", "resume=true", *SETTINGS)
    assert_same_run(whole, branch)
    assert saved_state(branch)[1]["config"]["init_from"] == "gone@3", "where it came from stays on record"


def test_branch_may_change_schedule_and_data(whole: Path, tmp_path: Path, capsys):
    for file in (base_dir() / "text").iterdir():
        shutil.copy(file, tmp_path / f"other_{file.name}")
    more = ("num_iterations=8", "optim.warmdown_ratio=0.25", "optim.warmup_steps=0", f"data.source={tmp_path}")
    with stop_after(4):
        pretrain_run("name=cooldown", "init_from=whole@3", *more)
    out = capsys.readouterr().out
    assert "the data, or its order, is not that of whole: it is read from its beginning" in out
    assert "changed since the checkpoint: optim.warmdown_ratio = 0.25 (was 0.65)" in out
    branch = pretrain_run("name=cooldown", "resume=true", *more)
    factors = logger.curve(logger.read(branch), "train/lr_factor")[1]
    assert factors[3:] == pytest.approx([1, 1, 1, 1, 0.525])
    _, meta = saved_state(branch)
    assert meta["progress"]["step"] == 8 and meta["progress"]["tokens"] == 8 * 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["name=b", "init_from=whole@7"], r"no checkpoint of step 7 in .*; there are steps 1, 2, 3, 4, 5, 6"),
        (["name=b", "init_from=nowhere@7"], "run=nowhere: no such run"),
        (["name=b", "init_from=whole@6"], "num_iterations=6: set more, as the branch counts on from step 6"),
        (["name=whole", "init_from=whole@3"], "is run whole itself; set another name, or resume_step"),
        (["name=whole", "init_from=whole@3", "overwrite=true"], "is run whole itself"),
        (["name=b", "init_from=tuned"], "init_from=tuned: not a pretraining run with its optimizer state"),
        (["name=b", "init_from=whole@3", "depth=3"], "checkpoint .*whole"),
    ],
)
def test_branch_that_cannot_be_is_refused(whole: Path, settings: list[str], message: str):
    tiny_run.save_run(base_dir(), "tuned", stage="sft")
    with pytest.raises(UserError, match=message):
        pretrain_run(*settings)
    assert saved_steps(whole) == [1, 2, 3, 4, 5, 6] and not saved_steps(train.run_folder("b"))


def test_branch_inherits_shape_and_batch_sizes_where_they_have_their_defaults(whole: Path, capsys):
    chosen = override(pretrain.Config(), ["name=b", "init_from=whole@3", "model.head_dim=16"])
    config, _ = pretrain.load_start(chosen)
    assert (config.depth, config.model.sequence_len, config.model.window_pattern) == (2, 32, "L")
    assert (config.total_batch_size, config.device_batch_size, config.model.head_dim) == (256, 4, 16)
    assert config.optim == chosen.optim and config.num_iterations is None
    assert "as in whole: " in capsys.readouterr().out


def test_a_step_of_a_run_is_named_in_one_way_everywhere(whole: Path):
    assert checkpoint.load("whole@3", device="cpu").step == 3
    assert checkpoint.load(f"{whole}@3", device="cpu").step == checkpoint.inspect("whole@3").step == 3
    here = distributed.init("cpu")
    config, start = train.load_base(sft.Config(), "sft", here, run="whole@3", step=None, stages=("base",))
    assert (config.name, start.step) == ("whole_sft", 3)
    assert checkpoint.load("whole@3", step=3, device="cpu").step == 3
    with pytest.raises(UserError, match="run=whole@3 and step=4: set one of the two steps"):
        checkpoint.load("whole@3", step=4)
    shutil.copytree(whole, whole.with_name("odd@2"))
    assert checkpoint.load("odd@2", device="cpu").step == 6, "a run that is called so"
    assert override(pretrain.Config(), ["init_from=a@1"]).init_from == "a@1"
