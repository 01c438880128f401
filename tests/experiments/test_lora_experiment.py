"""Fine-tuning with adapters end to end: what is saved, loading, resuming, and a base that is gone or has changed."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch

from experiments import sft
from nanochat import checkpoint, distributed, model, train, tree
from nanochat.config import UserError, override

TUNE = (
    "run=base", "compile=false", "device=cpu", "eval.every_steps=none", "eval.tokens=256", "eval.sample_tokens=4",
    "eval.prompts=the cat", "checkpoint.every_steps=2", "metrics.every_steps=1", "chat.tasks=arithmetic:size=2",
    "chat.max_tokens=4", "buffer_conversations=10", "num_iterations=4", "lora.rank=2", "lora.lr=0.01",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(corpus: Path) -> Path:
    """A base folder with a base model of two steps, and conversations."""
    rows = [{"prompt": f"the {word}", "completion": f"{word} it sat"} for word in tiny_run.WORDS] * 10
    (corpus / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_run.pretrain_run("name=base", "model.sequence_len=64", "total_batch_size=512", "num_iterations=2")
    return corpus


def tune(base: Path, *more: str) -> Path:
    lines = f"customjson:{base / 'lines.jsonl'}"
    config = override(sft.Config(), [*TUNE, f"tasks={lines}", f"val_tasks={lines}", *more])
    sft.run(config, distributed.init("cpu"))
    return train.run_folder(str(config.name))


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return tune(base, "name=tuned")


def test_run_holds_adapters_alone_and_loads_as_a_merged_model(base: Path, tuned: Path):
    state, meta = tiny_run.saved_state(tuned)
    names = list(tree.flatten(state.params))
    assert len(names) == 2 * (2 * 6 + 1) and all(name.endswith((".a", ".b")) for name in names)
    assert set(state.opt_state.keys()) == {"step", "matrix", "unembedding"}
    whole, loaded = checkpoint.load("base", device="cpu"), checkpoint.load(tuned, device="cpu")
    assert tree.nbytes(state.params) < tree.nbytes(whole.params) / 10
    assert meta["lora"]["base"] == checkpoint.base_reference(base / "runs" / "base", 2)
    assert loaded.stage == "sft" and meta["parent"] == {"run": "base", "step": 2, "stage": "base"}
    adapters = model.lora.with_scale(state.params, 16.0, 2)
    want = tree.flatten(model.lora.merge(whole.params, adapters))
    for name, x in tree.flatten(loaded.params).items():
        torch.testing.assert_close(x, want[name], rtol=0, atol=1e-6)
        assert torch.equal(x, tree.flatten(whole.params)[name]) != (f"{name}.a" in names), name
    losses = tiny_run.losses(tuned)
    assert losses[-1] < losses[0] - 0.01


def test_resumed_run_equals_uninterrupted_run(base: Path, tuned: Path, capsys: pytest.CaptureFixture[str]):
    with tiny_run.stop_after(1):
        tune(base, "name=stopped")
    with pytest.raises(UserError, match=r"run stopped was started with lora.rank=2: resume it with the same"):
        tune(base, "name=stopped", "resume=true", "lora.rank=3")
    capsys.readouterr()
    tiny_run.assert_same_run(tuned, tune(base, "name=stopped", "resume=true", "run=none"))
    out = capsys.readouterr().out
    assert "adapters" in out and "on 13 matrices" in out and "frozen" in out


def test_adapters_can_be_a_base_themselves(base: Path, tuned: Path):
    again = tune(base, "name=again", f"run={tuned}", "num_iterations=1")
    whole = tune(base, "name=whole", f"run={tuned}", "num_iterations=1", "lora.rank=0")
    assert checkpoint.inspect(again).meta["lora"]["base"]["run"] == str(tuned)
    before = tree.flatten(checkpoint.load(tuned).params)
    for run in (again, whole):
        after = tree.flatten(checkpoint.load(run).params)
        change = max(float((after[name] - x).abs().max()) for name, x in before.items())
        assert 0 < change < 0.5, run


def test_missing_or_changed_base_is_refused_by_name(base: Path, tuned: Path, tmp_path: Path):
    for name in ("base", "tuned"):
        shutil.copytree(base / "runs" / name, tmp_path / "runs" / name)
    moved, theirs = tmp_path / "runs" / "tuned", base / "runs" / "base"
    hidden = theirs.rename(base / "runs" / "hidden")
    try:
        assert checkpoint.load(moved).params["wte"].shape[1] == 64, "the base was moved along"
        shutil.rmtree(tmp_path / "runs" / "base")
        with pytest.raises(UserError, match=r"run tuned needs its base, step 2 of run base, which is not in"):
            checkpoint.load(moved)
        tiny_run.pretrain_run(
            "name=base", "model.sequence_len=64", "total_batch_size=512", "num_iterations=2", "seed=1"
        )
        with pytest.raises(UserError, match=r"step 2 of run base, which has changed in .*/runs/base"):
            tune(base, "name=tuned", "resume=true")
    finally:
        shutil.rmtree(theirs, ignore_errors=True)
        hidden.rename(theirs)
