"""A tiny quickstart: each stage starts from the one before; with --resume, a second call trains nothing."""

from pathlib import Path

import pytest

from experiments import quickstart
from nanochat import checkpoint, distributed, train
from nanochat.config import UserError, override
from nanochat.metrics import logger

pytestmark = pytest.mark.slow

TINY = (
    "depth=2", "compile=false", "device=cpu", "model.sequence_len=128", "model.aspect_ratio=32", "model.head_dim=32",
    "model.window_pattern=L", "device_batch_size=4", "total_batch_size=512", "num_iterations=2", "eval.every_steps=2",
    "eval.tokens=512", "eval.sample_tokens=2", "eval.prompts=the", "data.buffer_docs=20", "metrics.every_steps=1",
    "sft_steps=2", "rl_steps=1",
)  # fmt: skip


def test_quickstart_runs_all_stages_and_resume_skips_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(quickstart, "EVAL_PROBLEMS", 3)
    text = " ".join(["What is the sum of 37 and 85? Who are you? A word, letter by letter."] * 40)
    (tmp_path / "text").mkdir()
    for name in ("a", "val"):
        (tmp_path / "text" / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * 40)
    # `config` reads the base folder, so set it first.
    config = override(quickstart.config(), [*TINY, f"data.source={tmp_path / 'text'}"])
    monkeypatch.setattr(quickstart, "VOCAB_SIZE", 300)
    quickstart.run(config, distributed.init("cpu"))
    out = capsys.readouterr().out
    stages = {"quickstart": "base", "quickstart_sft": "sft", "quickstart_rl": "rl"}
    for name, kind in stages.items():
        loaded = checkpoint.load(name)
        assert loaded.stage == kind and loaded.config.sequence_len == 128
    for name in ("quickstart_sft", "quickstart_rl"):
        evaluation = logger.read_evaluations(train.run_folder(name))[-1]
        assert {"chat/Arithmetic", "chat/SimpleSpelling"} <= evaluation["metrics"].keys()
        assert f"--set run={list(stages)[-1]}" in out
    assert (train.run_folder("quickstart_rl") / "report.md").exists() and "quickstart took" in out
    meta = checkpoint.load_params(train.run_folder("quickstart_rl") / "checkpoints")[1]
    assert meta["parent"] == {"run": "quickstart_sft", "step": 2, "stage": "sft"}
    before = {name: (train.run_folder(name) / logger.FILE).read_text() for name in stages}
    quickstart.run(override(config, ["resume=true"]), distributed.init("cpu"))
    assert {name: (train.run_folder(name) / logger.FILE).read_text() for name in stages} == before


def test_negative_steps_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="sft_steps=-1, rl_steps=24: must be 0 or more"):
        override(quickstart.config(), ["sft_steps=-1"])
