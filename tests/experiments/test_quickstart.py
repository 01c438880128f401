"""A tiny quickstart: each stage starts from the one before; with --resume, a second call trains nothing."""

from pathlib import Path
from unittest import mock

import pytest
import tiny_run

from experiments import quickstart
from nanochat import checkpoint, distributed, train
from nanochat.config import UserError, base_dir, override
from nanochat.metrics import logger

pytestmark = pytest.mark.usefixtures("corpus")
TINY = (
    *(*tiny_run.SHAPE, "model.sequence_len=128", "device=cpu", "device_batch_size=4", "total_batch_size=512"),
    *("num_iterations=2", "eval.every_steps=2", "eval.tokens=512", "eval.sample_tokens=2", "eval.prompts=the"),
    *("data.buffer_docs=20", "metrics.every_steps=1"),
)


def run_quickstart(*more: str) -> None:
    config = override(quickstart.config(), [*TINY, f"data.source={base_dir() / 'text'}", *more])
    with mock.patch.multiple(quickstart, VOCAB_SIZE=300, EVAL_PROBLEMS=3):
        quickstart.run(config, distributed.init("cpu"))


@pytest.mark.slow
def test_quickstart_runs_all_stages_and_resume_skips_them(capsys: pytest.CaptureFixture[str]):
    run_quickstart("sft_steps=2", "rl_steps=1")
    out = capsys.readouterr().out
    stages = {"quickstart": "base", "quickstart_sft": "sft", "quickstart_rl": "rl"}
    for name, kind in stages.items():
        loaded = checkpoint.load(name)
        assert loaded.stage == kind and loaded.config.sequence_len == 128
    for name in ("quickstart_sft", "quickstart_rl"):
        (record,) = logger.read_evaluations(train.run_folder(name))
        assert {"chat/Arithmetic", "chat/SimpleSpelling"} <= record["metrics"].keys()
        assert f"--set run={list(stages)[-1]}" in out
    assert (train.run_folder("quickstart_rl") / "report.md").exists() and "quickstart took" in out
    meta = checkpoint.load_params(train.run_folder("quickstart_rl") / "checkpoints")[1]
    assert meta["parent"] == {"run": "quickstart_sft", "step": 2, "stage": "sft"}
    before = {name: (train.run_folder(name) / logger.FILE).read_text() for name in stages}
    run_quickstart("sft_steps=2", "rl_steps=1", "resume=true")
    assert {name: (train.run_folder(name) / logger.FILE).read_text() for name in stages} == before


def test_quickstart_without_sft(corpus: Path):
    run_quickstart("sft_steps=0", f"tokenizer={corpus / 'tokenizer'}")
    assert tiny_run.saved_steps(train.run_folder("quickstart")) == [2]


def test_negative_steps_raise():
    with pytest.raises(UserError, match="sft_steps=-1: must be at least 0"):
        override(quickstart.config(), ["sft_steps=-1"])
