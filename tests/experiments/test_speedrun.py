"""A tiny speedrun: interrupted, resumed, skipped, and rerun after a changed setting."""

import functools
import re
import threading
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import ranks
import tiny_run
import torch
from pyarrow import parquet

from experiments import _pipeline, pretrain, speedrun
from nanochat import checkpoint, distributed, train
from nanochat.config import UserError, base_dir, override
from nanochat.metrics import logger, run_folder, run_lock
from nanochat.model import linear

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("corpus")]

Capture = pytest.CaptureFixture[str]
Calls = list[tuple[str, bool, bool]]
STAGE = ("compile=false", "eval.every_steps=none", "eval.tokens=512", "eval.sample_tokens=2", "eval.prompts=hi")
STAGE += ("checkpoint.every_steps=2", "metrics.every_steps=1", "train.chunk_tokens=100")
PRETRAIN = (*tiny_run.SHAPE, *STAGE, "model.sequence_len=128", "depth=1", "num_iterations=6")
PRETRAIN += ("device_batch_size=2", "total_batch_size=512", "data.buffer_docs=20", "core.every_steps=none")
SFT = (*STAGE, "tasks=arithmetic:size=40", "val_tasks=arithmetic:test:size=8", "chat.tasks=", "num_iterations=4")
TINY = (
    *("device=cpu", "tokenizer.vocab_size=300"),
    *(f"pretrain.{setting}" for setting in PRETRAIN),
    *("eval_base.tasks=samples,bpb", "eval_base.free_samples=1", "eval_base.free_tokens=2"),
    *("eval_base.sample_tokens=2", "eval_base.tokens=512", "eval_base.device_batch_size=2"),
    *(f"sft.{setting}" for setting in SFT),
    *("eval_chat.tasks=arithmetic:size=4", "eval_chat.max_tokens=4", "eval_chat.compile=false"),
    *("report.sample_tokens=2", "report.answer_tokens=2", "report.questions=hi", "report.prompts=the cat"),
)
CPU = distributed.Runtime(0, 0, 1, 1, 0, torch.device("cpu"), torch.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stages that ran: (experiment, resume, overwrite)."""
    seen: Calls = []

    def watched(name: str, original: Any, config: Any, runtime: distributed.Runtime) -> None:
        seen.append((name, getattr(config, "resume", False), getattr(config, "overwrite", False)))
        original(config, runtime)

    for name, module in speedrun.EXPERIMENTS.items():
        monkeypatch.setattr(module, "run", functools.partial(watched, name, module.run))
    return seen


def settings(*more: str) -> list[str]:
    return [*TINY, f"source={base_dir() / 'text'}", *more]


def run_speedrun(*more: str) -> None:
    speedrun.run(override(speedrun.Config(), settings(*more)), distributed.init("cpu", "float32"))


def steps(name: str) -> list[int]:
    return [row["step"] for row in logger.read(train.run_folder(name)) if "train/loss" in row]


def test_interrupted_speedrun_resumes_and_then_skips_finished_stages(calls: Calls, capsys: Capture):
    for run in ("fast", "fast_sft"):
        with tiny_run.stop_after(3, run):
            run_speedrun("name=fast")
    out = capsys.readouterr().out
    assert "stopped during pretrain: run the same command again" in out and "stopped during sft" in out
    assert re.search(r"no estimate of time and cost: cpu", out) and "6 steps, 3.07k tokens" in out
    run_speedrun("name=fast")
    ran = ["data", "tokenizer", "pretrain", "pretrain", "eval_base", "sft", "sft", "eval_chat"]
    assert calls == [(name, i in (3, 6), False) for i, name in enumerate(ran)], "the second of two resumes"
    assert steps("fast") == [1, 2, 3, 4, 5, 6] and steps("fast_sft") == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert "resumed from step 3" in out and "--experiment=chat --set run=fast_sft" in out
    chain = run_folder.ancestors(train.run_folder("fast_sft"))
    assert [(info.name, info.stage, info.done) for info in chain] == [("fast", "base", True), ("fast_sft", "sft", True)]
    page = (train.run_folder("fast_sft") / "report.md").read_text("utf-8")
    assert "| eval_chat" in page and "| tokenizer" in page and "rithmetic" in page and "user: hi" in page
    assert len(logger.read_evaluations(train.run_folder("fast"))) == 1
    del calls[:]
    run_speedrun("name=fast")
    assert calls == [], "finished stages are skipped"
    assert capsys.readouterr().out.count("already done") == 6


def test_changed_setting_reruns_its_stage_and_the_later_ones(calls: Calls, capsys: Capture):
    series = ("name=again", "stages=data,tokenizer,pretrain,sft,eval_chat", "pretrain.num_iterations=2")
    run_speedrun(*series, "sft.num_iterations=2")
    assert [name for name, *_ in calls] == ["data", "tokenizer", "pretrain", "sft", "eval_chat"]
    before = _pipeline.latest_checkpoint_id(train.run_folder("again"))
    del calls[:]
    series += ("sft.num_iterations=3",)
    run_speedrun(*series, "sft.device_batch_size=4")
    assert calls == [("sft", False, True), ("eval_chat", False, False)]
    out = capsys.readouterr().out
    assert "rerun: num_iterations 2 → 3" in out and "rerun: an earlier stage ran again" in out
    assert steps("again_sft") == [1, 2, 3] and _pipeline.latest_checkpoint_id(train.run_folder("again")) == before
    del calls[:]
    run_speedrun(*series, "pretrain.optim.matrix_lr=0.05")
    assert calls == [("pretrain", False, True), ("sft", False, True), ("eval_chat", False, False)]
    assert checkpoint.steps(train.run_folder("again") / "checkpoints.old") == [2], "the replaced checkpoints are kept"
    assert "pretrain   rerun" in capsys.readouterr().out


def test_failed_evaluation_does_not_stop_the_run(calls: Calls, capsys: Capture):
    short = ("name=part", "pretrain.num_iterations=1", "sft.num_iterations=1", "report.samples=false")
    with pytest.raises(UserError, match="eval_chat failed"):
        run_speedrun(*short, "eval_chat.tasks=arithmetic:size=4,gsm8k:/nowhere")
    assert (train.run_folder("part_sft") / "report.md").exists(), "the report is written anyway"
    assert "next" in capsys.readouterr().out.lower()
    del calls[:]
    run_speedrun(*short)
    assert [name for name, *_ in calls] == ["eval_chat"]


def test_invalid_stages_raise() -> None:
    with pytest.raises(UserError, match="in this order"):
        run_speedrun("stages=pretrain,data")
    with pytest.raises(UserError, match="expected one of data"):
        run_speedrun("stages=pretraining")


def test_stages_inherit_name_device_and_source() -> None:
    config = speedrun.resolve(override(speedrun.Config(), settings("name=x", "fp8=true")), CPU)
    assert (config.pretrain.name, config.sft.run, config.sft.name, config.eval_chat.run) == ("x", "x", "x_sft", "x_sft")
    assert config.pretrain.tokenizer == config.tokenizer.out == str(base_dir() / "x_tokenizer")
    sources = {stage.data.source for stage in (config.data, config.tokenizer, config.pretrain)}
    assert sources == {str(base_dir() / "text")}
    assert config.pretrain.train.linear == "fp8" and config.sft.device == config.pretrain.device == "cpu"
    assert speedrun.resolve(speedrun.Config(), CPU).pretrain.train.linear == "dense"


def test_defaults_are_the_references(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(linear, "fp8_support", lambda _: "native")
    config = speedrun.resolve(speedrun.Config(), CPU).pretrain
    assert (config.depth, config.device_batch_size, config.train.linear) == (24, 16, "fp8")
    assert pretrain.resolve(config, None)[1].num_steps == 5568 and config.target_param_data_ratio == 8
    monkeypatch.setattr(linear, "fp8_support", lambda _: "emulated")
    stages = speedrun.make_stages(speedrun.resolve(speedrun.Config(), CPU))
    assert stages[2].description == "depth 24, dense, as this device has no native fp8"


def test_tokenizer_trains_on_first_shards_while_others_are_fetched(calls: Calls, monkeypatch, base: Path) -> None:
    tokenizer_done, order = threading.Event(), []
    train_tokenizer = speedrun.tokenizer.run

    def climbmix(folder: Path, num_shards: int, *_: Any, **__: Any) -> int:
        if num_shards > 8:
            assert tokenizer_done.wait(60)
        folder.mkdir(exist_ok=True)
        for index in [*range(num_shards), 6542]:
            parquet.write_table(
                pyarrow.table({"text": ["the cat sat on a mat"] * 9}), folder / f"shard_{index:05}.parquet"
            )
        order.append(num_shards)
        return num_shards + 1

    def tokenizer_run(config: Any, runtime: Any) -> None:
        order.append("tokenizer")
        train_tokenizer(config, runtime)
        tokenizer_done.set()

    monkeypatch.setattr(speedrun.download, "climbmix", climbmix)
    monkeypatch.setattr(speedrun.tokenizer, "run", tokenizer_run)
    settings = ["stages=data,tokenizer", "data.num_shards=12", "data.bundle_url=none", "tokenizer.vocab_size=270"]
    speedrun.run(override(speedrun.Config(), settings), CPU)
    assert order == [8, "tokenizer", 12] and len(list((base / "climbmix").iterdir())) == 13
    speedrun.run(override(speedrun.Config(), settings), CPU)
    assert order[3:] == [12], "a speedrun that was stopped meanwhile fetches the rest before it pretrains"


def test_second_speedrun_of_a_name_is_refused(base: Path) -> None:
    with run_lock.held(base / "speedrun" / "speedrun"), pytest.raises(UserError, match="speedrun is in use by process"):
        speedrun.run(speedrun.Config(), CPU)


def test_estimate_shows_time_and_cost_on_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    eight = distributed.Runtime(0, 0, 8, 8, 0, torch.device("cuda", 0), torch.bfloat16)
    config = override(speedrun.Config(), ["pretrain.depth=4"])
    text = speedrun.estimate(config, eight)
    assert re.search(r"about (\S+) and \$([\d,]+) by the planner's estimate, at 50% MFU and \$3.00", text), text
    assert "does not fit" in speedrun.estimate(override(config, ["pretrain.device_batch_size=4096"]), eight)


def test_speedrun_on_two_ranks() -> None:
    short = settings("name=two", "pretrain.num_iterations=2", "sft.num_iterations=2", "report.samples=false")
    outs = ranks.launch(2, "--experiment=speedrun", *(f"--set={setting}" for setting in short), timeout=500)
    assert "Next:" in outs[0] and not outs[1]
    chain = run_folder.ancestors(train.run_folder("two_sft"))
    assert [info.done for info in chain] == [True, True]
