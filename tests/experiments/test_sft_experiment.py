"""Tiny fine-tuning end to end: loss decreases, bit-exact resume, the same on two ranks."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
import torch
from tiny_run import WORDS

from experiments import midtrain, sft
from nanochat import checkpoint, distributed, tasks, train, tree
from nanochat.config import UserError, override
from nanochat.metrics import logger, report, run_folder
from nanochat.tasks import hub_table
from nanochat.train import init_from

CONVERSATIONS = [
    [{"role": "user", "content": f"the {word}"}, {"role": "assistant", "content": f"{word} it sat, {word}"}]
    for word in WORDS
] * 20
BASE = ("name=base", "model.sequence_len=64", "total_batch_size=512", "num_iterations=2", "eval.tokens=512")
BASE += ("optim.matrix_lr=0.15", "optim.embedding_lr=1.0", "optim.unembedding_lr=0.1", "optim.warmup_steps=1")
TUNE = (
    "run=base", "name=tuned", "compile=false", "device=cpu", "eval.every_steps=3", "eval.tokens=1024",
    "eval.sample_tokens=4", "checkpoint.every_steps=2", "metrics.every_steps=1", "eval.prompts=the cat",
    "chat.tasks=arithmetic:size=4", "chat.max_tokens=8", "chat.every_steps=3", "buffer_conversations=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(corpus: Path) -> Path:
    """A base folder with a base model of two steps, and conversations."""
    (corpus / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CONVERSATIONS))
    tiny_run.pretrain_run(*BASE)
    return corpus


def settings(base: Path, *more: str) -> list[str]:
    lines = base / "lines.jsonl"
    return [*TUNE, f"tasks=customjson:{lines}", f"val_tasks=customjson:{lines}", *more]


def fine_tune(base: Path, *more: str) -> Path:
    config = override(sft.Config(), settings(base, *more))
    sft.run(config, distributed.init("cpu"))
    return train.run_folder(str(config.name))


def header(folder: Path, step: int | None = None) -> dict[str, Any]:
    return checkpoint.load_params(folder / "checkpoints", step=step)[1]


@pytest.fixture(scope="module")
def uninterrupted(base: Path) -> Path:
    return fine_tune(base, "name=uninterrupted")


def test_loss_decreases_and_checkpoint_names_parent(base: Path, uninterrupted: Path):
    rows = logger.read(uninterrupted)
    losses = logger.curve(rows, "train/loss")[1]
    assert len(losses) >= 5 and losses[-1] < 0.9 * losses[0]
    bpb = logger.curve(rows, "val/bpb")[1]
    assert bpb[-1] < bpb[0] and logger.curve(rows, "chat/Arithmetic")[0][-1] == len(losses)
    loaded = checkpoint.load(uninterrupted)
    assert loaded.stage == "sft" and loaded.config == checkpoint.load("base").config
    meta = header(uninterrupted)
    assert meta["parent"] == {"run": "base", "step": 2, "stage": "base"}
    assert meta["config"]["total_batch_size"] == 512 and meta["config"]["optim.matrix_lr"] == 0.15, "the parent's"
    assert meta["progress"]["done"] and rows[-1]["step"] == len(losses)
    factors = logger.curve(rows, "train/lr_factor")[1]
    assert factors[0] == pytest.approx(0.8) and factors[-1] < 0.4


def test_starts_from_parent_weights_and_moments(base: Path):
    origin = init_from.load("base")
    state = init_from.init_state_from(origin, distributed.init("cpu"), None)
    assert int(state.step) == 0 and int(state.opt_state["step"]) == 2
    assert any(leaf.any() for leaf in tree.leaves(state.opt_state["matrix"]))
    params, _, _ = checkpoint.load_params(base / "runs" / "base" / "checkpoints")
    cold = init_from.init_state_from(origin, distributed.init("cpu"), None, moments=False)
    for name, x in tree.flatten(params).items():
        assert torch.equal(x, tree.flatten(state.params)[name]) and torch.equal(x, tree.flatten(cold.params)[name])
    assert int(cold.opt_state["step"]) == 0 and not any(leaf.any() for leaf in tree.leaves(cold.opt_state))


@pytest.mark.parametrize(("step", "run"), [(1, "run=none"), (3, "run=base")])
def test_resumed_run_equals_uninterrupted_run(base: Path, uninterrupted: Path, step: int, run: str):
    with tiny_run.stop_after(step):
        fine_tune(base, f"name=stopped{step}")
    tiny_run.assert_same_run(uninterrupted, fine_tune(base, f"name=stopped{step}", "resume=true", run))


def test_finished_run_is_not_trained_again(base: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]):
    before = (uninterrupted / "metrics.jsonl").read_text()
    fine_tune(base, "name=uninterrupted", "resume=true")
    assert (uninterrupted / "metrics.jsonl").read_text() == before
    assert "done" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_match_single_process(base: Path):
    single = fine_tune(base, "name=one", "num_iterations=2")
    values = settings(base, "name=two", "num_iterations=2", "device_batch_size=2")
    ranks.launch(2, "--experiment=sft", *(f"--set={value}" for value in values), env={"NANOCHAT_BASE_DIR": str(base)})
    rows = [logger.read(run) for run in (single, base / "runs" / "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    # To within rounding, which Muon makes larger where a base model of two steps has weights of nearly zero.
    for name, exact in {"train/loss": 1e-4, "val/bpb": 1e-3, "chat/Arithmetic": 0.0}.items():
        first, second = (logger.curve(run, name)[1] for run in rows)
        assert first == pytest.approx(second, rel=exact) and first


def test_mid_training_records_stage_and_can_be_fine_tuned(base: Path):
    config = override(midtrain.config(), settings(base, "name=mid", "num_iterations=2", "chat.tasks="))
    midtrain.run(config, distributed.init("cpu"))
    folder = train.run_folder("mid")
    assert header(folder)["stage"] == "mid" and not header(folder)["config"]["assistant_only"]
    assert logger.curve(logger.read(folder), "train/lr_factor")[1] == pytest.approx([1.0, 1.0])
    fine_tune(base, "run=mid", "name=none", "num_iterations=1", "chat.tasks=")
    assert header(train.run_folder("mid_sft"))["parent"] == {"run": "mid", "step": 2, "stage": "mid"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run=nothing", "run=nothing: no such run"),
        ("step=7", "no checkpoint of step 7 in .*; there are steps 2"),
        ("total_batch_size=100", "total_batch_size=100: not a multiple of the context 64"),
        ("device_batch_size=3", "device_batch_size=3: does not divide the 8 rows"),
        ("tasks=x*gsm8k", "expected a number before the"),
        ("tasks=arithmetik", "'arithmetik': no such task; did you mean arithmetic"),
        ("tasks=", "tasks: name at least one"),
    ],
)
def test_invalid_settings_raise_one_line_error(base: Path, setting: str, message: str):
    with pytest.raises(UserError, match=message):
        fine_tune(base, "name=wrong", setting)


def test_missing_base_run_names_the_command_that_trains_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no base or mid model in .*train one with .*quickstart"):
        sft.run(sft.Config(), distributed.init("cpu"))


ASK = {"role": "user", "content": "the cat"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASK, {"role": "assistant", "content": "it sat", "weight": 0}], "none of the 3 .*: their answers are all"),
        ([{**ASK, "content": "the cat " * 80}, {"role": "assistant", "content": "it sat"}], "none of the 3 .*: longer"),
        ([ASK, {"role": "assistant", "content": ""}], "the validation data has no text to predict: change .*val_tasks"),
    ],
)
@pytest.mark.parametrize("setting", ["val_tasks", "tasks"])
def test_nothing_to_learn_or_validate_is_an_error(
    base: Path, tmp_path: Path, setting: str, messages: Any, message: str
):
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{json.dumps(messages)}\n" * 3)
    empty = setting == "tasks" and not messages[1]["content"]  # the end of an empty answer can be learned
    with contextlib.nullcontext() if empty else pytest.raises(UserError, match=message):
        fine_tune(base, "name=nothing", "overwrite=true", f"{setting}=customjson:{file}", "num_iterations=2")
    assert empty or not checkpoint.steps(train.run_folder("nothing") / "checkpoints")


def test_own_conversations_need_no_network(base: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):

    def unreachable(*_: Any) -> Any:
        raise tasks.MissingDataError("no network")

    monkeypatch.setattr(hub_table, "_load_from_hub", unreachable)
    lines, config = f"customjson:{base / 'lines.jsonl'}", sft.Config()
    defaults = [
        f"val_tasks={','.join(config.val_tasks)}",
        f"chat.tasks={','.join(config.chat.tasks)},arithmetic:size=4",
    ]
    folder = fine_tune(base, "name=offline", *defaults, "num_iterations=2")
    out = capsys.readouterr().out
    names = ", ".join((*config.val_tasks, *config.chat.tasks))
    sentence = f"skipped: {names}: no network; no validation: --set tasks=customjson:FILE:start=50"
    assert out.count(sentence) == 2, "at the start and at the end"
    rows = logger.read(folder)
    assert logger.curve(rows, "val/bpb")[0] == [] and logger.curve(rows, "chat/Arithmetic")[0] == [2]
    page = report.skipped([run_folder.read_run(folder)])
    assert "- SFT: ARC-Easy: no network" in page and "- SFT: smoltalk:test: no network" in page
    folder = fine_tune(base, "name=held_out", f"tasks={lines}:start=20", f"val_tasks={lines}:stop=20,gsm8k:test")
    assert "skipped: gsm8k:test: no network\n" in capsys.readouterr().out
    assert logger.curve(logger.read(folder), "val/bpb")[0]
    with pytest.raises(UserError, match=r"tasks=smoltalk,mmlu:auxiliary_train,gsm8k: no network; or train on other"):
        fine_tune(base, "name=wrong", f"tasks={','.join(config.tasks)},identity")
    with pytest.raises(UserError, match="'gsm9k': no such task"):
        fine_tune(base, "name=wrong", "val_tasks=gsm9k")
