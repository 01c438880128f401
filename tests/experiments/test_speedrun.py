"""A tiny speedrun: interrupted, resumed, skipped, and rerun after a changed setting."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks as gloo
import tiny_run
import torch

from experiments import speedrun
from nanochat import checkpoint, distributed, train
from nanochat.config import UserError, override
from nanochat.metrics import logger, run_folder
from nanochat.train import pipeline
from nanochat.train import stage as runs

pytestmark = pytest.mark.slow

MODEL = (
    *(
        "compile=false",
        "model.sequence_len=128",
        "model.aspect_ratio=32",
        "model.head_dim=32",
        "model.window_pattern=L",
    ),
    *("depth=1", "device_batch_size=2", "total_batch_size=512", "num_iterations=6", "checkpoint.every_steps=2"),
    *("eval.every_steps=none", "eval.tokens=512", "eval.sample_tokens=2", "eval.prompts=the cat"),
    *("metrics.every_steps=1", "core.every_steps=none", "train.chunk_tokens=100", "data.buffer_docs=20"),
)
SFT = (
    *(
        "compile=false",
        "tasks=arithmetic:size=40",
        "val_tasks=arithmetic:test:size=8",
        "chat.tasks=",
        "num_iterations=4",
    ),
    *(
        "eval.every_steps=none",
        "eval.tokens=512",
        "eval.sample_tokens=2",
        "eval.prompts=hi",
        "checkpoint.every_steps=2",
    ),
    *("metrics.every_steps=1", "train.chunk_tokens=100"),
)
TINY = (
    *("device=cpu", "tokenizer.vocab_size=300"),
    *(f"pretrain.{setting}" for setting in MODEL),
    *(
        "eval_base.tasks=samples,bpb",
        "eval_base.free_samples=1",
        "eval_base.free_tokens=2",
        "eval_base.sample_tokens=2",
    ),
    *("eval_base.tokens=512", "eval_base.device_batch_size=2"),
    *(f"sft.{setting}" for setting in SFT),
    *("eval_chat.tasks=arithmetic:size=4", "eval_chat.max_tokens=4", "eval_chat.compile=false"),
    *("report.sample_tokens=2", "report.answer_tokens=2", "report.questions=hi", "report.prompts=the cat"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with a folder of small documents."""
    folder = tmp_path_factory.mktemp("base")
    tiny_run.write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setattr(runs, "peak_flops", lambda *_: (1e12, "made up"))  # measuring it takes longer than the runs
        yield folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, bool]]:
    """Stages that ran: (experiment, resume, overwrite)."""
    seen: list[tuple[str, bool, bool]] = []

    def watched(name: str, original: Any) -> Any:
        def call(config: Any, runtime: distributed.Runtime) -> None:
            seen.append((name, getattr(config, "resume", False), getattr(config, "overwrite", False)))
            original(config, runtime)

        return call

    for name, module in speedrun.EXPERIMENTS.items():
        monkeypatch.setattr(module, "run", watched(name, module.run))
    return seen


def tiny(base: Path, *more: str) -> speedrun.Config:
    return override(speedrun.config(), [*TINY, f"source={base / 'text'}", *more])


def steps(name: str) -> list[int]:
    return [row["step"] for row in logger.read(train.run_folder(name)) if "train/loss" in row]


def stop_at(monkeypatch: pytest.MonkeyPatch, run: str, at: int) -> None:
    """Send SIGTERM after a step of a run, as a scheduler would."""
    original = logger.write

    def write(log: Any, step: int, values: Any) -> None:
        original(log, step, values)
        if step == at and log.file and Path(log.file.name).parent.name == run and "train/loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logger, "write", write)


def test_interrupted_speedrun_resumes_and_then_skips_finished_stages(
    base: Path,
    calls: list[tuple[str, bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime = distributed.init("cpu", "float32")
    config = tiny(base, "name=fast")
    for run, at in (("fast", 3), ("fast_sft", 3)):
        with monkeypatch.context() as patch:
            stop_at(patch, run, at)
            with pytest.raises(SystemExit) as stop:
                speedrun.run(config, runtime)
        assert stop.value.code == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "stopped during pretrain: run the same command again" in out and "stopped during sft" in out
    assert re.search(r"no estimate of time and cost: cpu", out) and "6 steps, 3.07k tokens" in out
    speedrun.run(config, runtime)
    assert calls == [
        ("data", False, False),
        ("tokenizer", False, False),
        ("pretrain", False, False),
        ("pretrain", True, False),
        ("eval_base", False, False),
        ("sft", False, False),
        ("sft", True, False),
        ("eval_chat", False, False),
    ]
    assert steps("fast") == [1, 2, 3, 4, 5, 6] and steps("fast_sft") == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert "resumed from step 3" in out and "--experiment=chat --set run=fast_sft" in out
    chain = run_folder.ancestors(train.run_folder("fast_sft"))
    assert [(info.name, info.stage, info.done) for info in chain] == [("fast", "base", True), ("fast_sft", "sft", True)]
    page = (train.run_folder("fast_sft") / "report.md").read_text("utf-8")
    assert "| eval_chat" in page and "| tokenizer" in page and "rithmetic" in page and "user: hi" in page
    assert len(logger.read_evaluations(train.run_folder("fast"))) == 1
    del calls[:]
    speedrun.run(config, runtime)
    assert calls == [], "finished stages are skipped"
    assert capsys.readouterr().out.count("already done") == 6


def test_changed_setting_reruns_its_stage_and_the_later_ones(
    base: Path, calls: list[tuple[str, bool, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = distributed.init("cpu", "float32")
    settings = [
        "name=again",
        "stages=data,tokenizer,pretrain,sft,eval_chat",
        "pretrain.num_iterations=2",
        "sft.num_iterations=2",
    ]
    speedrun.run(tiny(base, *settings), runtime)
    assert [name for name, *_ in calls] == ["data", "tokenizer", "pretrain", "sft", "eval_chat"]
    before = pipeline.latest_checkpoint_id(train.run_folder("again"))
    del calls[:]
    settings[-1] = "sft.num_iterations=3"
    speedrun.run(tiny(base, *settings, "sft.device_batch_size=4"), runtime)
    assert calls == [("sft", False, True), ("eval_chat", False, False)]
    out = capsys.readouterr().out
    assert "rerun: num_iterations 2 → 3" in out and "rerun: an earlier stage ran again" in out
    assert steps("again_sft") == [1, 2, 3] and pipeline.latest_checkpoint_id(train.run_folder("again")) == before
    del calls[:]
    speedrun.run(tiny(base, *settings, "pretrain.optim.matrix_lr=0.05"), runtime)
    assert calls == [("pretrain", False, True), ("sft", False, True), ("eval_chat", False, False)]
    assert checkpoint.steps(train.run_folder("again") / "checkpoints.old") == [2], "the replaced checkpoints are kept"
    assert "pretrain   rerun" in capsys.readouterr().out


def test_failed_evaluation_does_not_stop_the_run(
    base: Path, calls: list[tuple[str, bool, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = distributed.init("cpu", "float32")
    settings = ["name=part", "pretrain.num_iterations=1", "sft.num_iterations=1", "report.samples=false"]
    with pytest.raises(UserError, match="eval_chat failed"):
        speedrun.run(tiny(base, *settings, "eval_chat.tasks=arithmetic:size=4,gsm8k:/nowhere"), runtime)
    assert (train.run_folder("part_sft") / "report.md").exists(), "the report is written anyway"
    assert "next" in capsys.readouterr().out.lower()
    del calls[:]
    speedrun.run(tiny(base, *settings), runtime)
    assert [name for name, *_ in calls] == ["eval_chat"]


def test_invalid_stages_raise(base: Path) -> None:
    runtime = distributed.init("cpu", "float32")
    with pytest.raises(UserError, match="in this order"):
        speedrun.run(tiny(base, "stages=pretrain,data"), runtime)
    with pytest.raises(UserError, match="expected one of data"):
        tiny(base, "stages=pretraining")


def test_stages_inherit_name_device_and_source(base: Path) -> None:
    config = speedrun.resolve(tiny(base, "name=x", "fp8=true"), distributed.init("cpu", "float32"))
    assert (config.pretrain.name, config.sft.run, config.sft.name, config.eval_chat.run) == ("x", "x", "x_sft", "x_sft")
    assert config.pretrain.tokenizer == config.tokenizer.out == str(base / "x_tokenizer")
    assert {config.data.data.source, config.tokenizer.data.source, config.pretrain.data.source} == {str(base / "text")}
    assert config.pretrain.train.linear == "fp8" and config.sft.device == config.pretrain.device == "cpu"
    plain = speedrun.config()
    assert plain.pretrain.depth == 24 and plain.data.num_shards == 170
    assert speedrun.resolve(plain, distributed.init("cpu", "float32")).pretrain.train.linear == "dense"


def test_estimate_shows_time_and_cost_on_a_known_gpu(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    eight = distributed.Runtime(0, 0, 8, 8, 0, torch.device("cuda", 0), torch.bfloat16)
    config = speedrun.config()
    text = speedrun.estimate(override(config, ["pretrain.depth=4"]), eight)
    match = re.search(r"about (\S+) and \$([\d,]+) by the planner's estimate, at 50% MFU and \$3.00", text)
    assert match, text
    assert "does not fit" in speedrun.estimate(
        override(config, ["pretrain.depth=4", "pretrain.device_batch_size=4096"]), eight
    )


def test_speedrun_on_two_ranks(base: Path) -> None:
    settings = ["name=two", "pretrain.num_iterations=2", "sft.num_iterations=2", "report.samples=false"]
    arguments = [f"--set={setting}" for setting in (*TINY, f"source={base / 'text'}", *settings)]
    outs = gloo.launch(2, "--experiment=speedrun", *arguments, timeout=500)
    assert "Next:" in outs[0] and not outs[1]
    chain = run_folder.ancestors(train.run_folder("two_sft"))
    assert [info.done for info in chain] == [True, True]
