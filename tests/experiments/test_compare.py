"""compare on tiny runs: equal runs, seeds, documents, runs of different lengths, errors, ranks."""

import dataclasses
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks as gloo
import tiny_run
import torch

from experiments import compare as experiment
from experiments import pretrain
from nanochat import checkpoint, distributed, model
from nanochat.config import UserError, override
from nanochat.data import tokenizer
from nanochat.metrics import logger, run_folder
from nanochat.train import stage as runs

pytestmark = pytest.mark.slow

TINY = (
    *("compile=false", "device=cpu", "model.sequence_len=32", "model.aspect_ratio=32", "model.head_dim=32"),
    *("model.window_pattern=L", "depth=1", "device_batch_size=4", "total_batch_size=256", "num_iterations=8"),
    *("checkpoint.every_steps=4", "eval.every_steps=2", "eval.tokens=512", "eval.sample_tokens=2", "eval.prompts=the"),
    *("metrics.every_steps=1", "core.every_steps=none", "train.chunk_tokens=50", "data.buffer_docs=20"),
    *("optim.matrix_lr=0.1", "optim.warmup_steps=2"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with two seeds of a run, another learning rate, another context, and twice the length."""
    folder = tmp_path_factory.mktemp("base")
    texts = tiny_run.write_corpus(folder)
    tokenizer.save(tokenizer.train(texts, 300), folder / "tokenizer")
    tokenizer.save(tokenizer.train(texts, 280), folder / "tokenizer280")
    made = {
        "one": (),
        "one_b": ("seed=1",),
        "slow": ("optim.matrix_lr=0.0001", "optim.embedding_lr=0.001"),
        "slow_b": ("optim.matrix_lr=0.0001", "optim.embedding_lr=0.001", "seed=1"),
        "other": ("model.sequence_len=64", f"tokenizer={folder / 'tokenizer280'}"),
        "long": ("num_iterations=16",),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setattr(runs, "peak_flops", lambda *_: (1e12, "made up"))
        for name, more in made.items():
            config = override(pretrain.config(), [*TINY, f"data.source={folder / 'text'}", f"name={name}", *more])
            pretrain.run(config, distributed.init("cpu", "float32"))
        yield folder


def compared(capsys: pytest.CaptureFixture[str], *words: str, **settings: Any) -> str:
    config = dataclasses.replace(experiment.config(), args=words, **settings)
    capsys.readouterr()
    experiment.run(config, distributed.init("cpu", "float32"))
    return capsys.readouterr().out


def numbers(out: str, axis: str) -> list[float]:
    """Return a, b, difference, low and high of the table's row."""
    row = next(line for line in out.splitlines() if line.strip().startswith(f"{axis}:"))
    return [float(x) for x in re.findall(r"[+-]?\d+\.\d{4}\b", row)]


def test_run_does_not_differ_from_itself(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compared(capsys, "one", "one")
    assert numbers(out, "FLOPs")[2:] == numbers(out, "time")[2:] == [0, 0, 0]
    assert out.count("no significant difference") == 2 and "none but name and seed" in out


def test_rows_give_the_values_of_the_runs_own_evaluations(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compared(capsys, "one", "slow")
    a, b, difference, low, high = numbers(out, "FLOPs")
    last = {name: logger.curve(logger.read(base / "runs" / name), "val/bpb")[1][-1] for name in ("one", "slow")}
    assert a == pytest.approx(last["one"], abs=6e-5) and b == pytest.approx(last["slow"], abs=6e-5)
    assert f"one: {last['one']:.4f} bits per byte" in out, "measured again, it equals the recorded value"
    assert difference == pytest.approx(b - a, abs=2e-4) and low < difference < high and low > 0
    assert "16 rows, paired" in out and "optim.matrix_lr 0.1 → 0.0001" in out
    assert "at equal FLOPs one is better by" in out and "not what another seed would change" in out
    for file in ("bpb_flops.svg", "bpb_time.svg", "difference.svg"):
        assert ET.parse(base / "compare" / "one_slow" / file).getroot().tag.endswith("svg")


def test_several_seeds_widen_the_interval(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = numbers(compared(capsys, "one", "slow"), "FLOPs")
    out = compared(capsys, "one,one_b", "slow*")
    several = numbers(out, "FLOPs")
    assert several[4] - several[3] > alone[4] - alone[3]
    assert "and the seeds (2 and 2 runs)" in out and "differ in more" not in out
    assert "differ in more than their seed (optim.embedding_lr" in compared(capsys, "one,slow", "one_b")


def test_different_tokenizers_and_contexts_are_compared_by_documents(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = compared(capsys, "one", "other", tokens=400)
    assert re.search(r"\d+ documents, paired", out) and len(numbers(out, "FLOPs")) == 5
    printed = re.findall(r"^(\w+): (\d\.\d{4}) bits per byte$", out, re.MULTILINE)
    assert [name for name, _ in printed] == ["one", "other"]
    # By hand: each document alone, truncated to both contexts.
    records = [run_folder.read_run(base / "runs" / name) for name in ("one", "other")]
    toks = [checkpoint.load_tokenizer(checkpoint.inspect(one.folder, one.step)) for one in records]
    texts = experiment.documents(experiment.config(), [(one, one.step) for one in records], toks, 400)
    for text in texts:
        assert len(toks[0].encode(text)) <= 32 and len(toks[1].encode(text)) <= 64
    bot = checkpoint.load("other")
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[bot.tokenizer.bos, *bot.tokenizer.encode(text)]])
        logits = model.apply(bot.params, ids[:, :-1], config=bot.config)
        nats += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    assert float(printed[1][1]) == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in texts), abs=6e-5)


def test_longer_run_is_read_where_the_shorter_ends(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compared(capsys, "one", "long")
    assert "long is read at 50% of its run" in out and "long: checkpoint of step 14 of 16" in out
    steps, bpb = logger.curve(logger.read(base / "runs" / "long"), "val/bpb")
    assert numbers(out, "FLOPs")[1] == pytest.approx(bpb[steps.index(8)], abs=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("one",), "two arguments"),
        (("one", "nothing"), "no such run"),
        (("one", "x*"), "matches no run"),
        (("one", ","), "names no run"),
    ],
)
def test_wrong_arguments(base: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compared(capsys, *words)


def test_run_without_evaluations_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = base / "runs" / "blind"
    shutil.copytree(base / "runs" / "one", blind)
    (blind / "metrics.jsonl").write_text("")
    try:
        with pytest.raises(UserError, match="run blind has no evaluation"):
            compared(capsys, "one", "blind")
    finally:
        shutil.rmtree(blind)


def test_two_ranks_print_what_one_prints(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = compared(capsys, "one", "slow")
    outs = gloo.launch(2, "--experiment=compare", "one", "slow", "--set=device=cpu")
    assert not outs[1]
    assert [line for line in outs[0].splitlines() if line] == [line for line in alone.splitlines() if line]
