"""compare on tiny runs: equal runs, seeds, documents, runs of different lengths, errors, ranks."""

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
from nanochat import checkpoint, data, distributed, model
from nanochat.config import UserError
from nanochat.data import sources, tokenizer
from nanochat.metrics import logger
from nanochat.train import stage

pytestmark = pytest.mark.slow

SETTINGS = (
    *("depth=1", "num_iterations=8", "checkpoint.every_steps=4", "eval.every_steps=2", "eval.tokens=512"),
    *("eval.sample_tokens=2", "core.every_steps=none", "optim.matrix_lr=0.1", "optim.warmup_steps=2"),
)
SLOW = ("optim.matrix_lr=0.0001", "optim.embedding_lr=0.001")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with two seeds of a run, another learning rate, another context, and twice the length."""
    with tiny_run.base_folder(tmp_path_factory.mktemp("base")) as folder, pytest.MonkeyPatch.context() as patch:
        texts = sources.texts(data.DataConfig(str(folder / "text")), "train")
        tokenizer.save(tokenizer.train(texts, 280), folder / "tokenizer280")
        patch.setattr(stage, "peak_flops", lambda *_: (1e12, "made up"))
        runs: dict[str, tuple[str, ...]] = {"one": (), "one_b": ("seed=1",), "slow": SLOW, "slow_b": (*SLOW, "seed=1")}
        runs["other"] = ("model.sequence_len=64", f"tokenizer={folder / 'tokenizer280'}")
        for name, more in (runs | {"long": ("num_iterations=16",)}).items():
            tiny_run.pretrain_run(*SETTINGS, f"name={name}", *more)
        yield folder


def compared(capsys: pytest.CaptureFixture[str], *words: str, **settings: Any) -> str:
    capsys.readouterr()
    experiment.run(experiment.Config(words, **settings), distributed.init("cpu", "float32"))
    return capsys.readouterr().out


def numbers(out: str, axis: str) -> list[float]:
    """Return a, b, difference, low and high of the table's row."""
    row = next(line for line in out.splitlines() if line.strip().startswith(f"{axis}:"))
    return [float(x) for x in re.findall(r"[+-]?\d+\.\d{4}\b", row)]


def curve(base: Path, name: str) -> tuple[list[float], list[float]]:
    return logger.curve(logger.read(base / "runs" / name), "val/bpb")


def test_run_does_not_differ_from_itself(base: Path, capsys: pytest.CaptureFixture[str]):
    out = compared(capsys, "one", "one")
    assert numbers(out, "FLOPs")[2:] == numbers(out, "time")[2:] == [0, 0, 0]
    assert out.count("no significant difference") == 2 and "none but name and seed" in out


def test_rows_give_the_values_of_the_runs_own_evaluations(base: Path, capsys: pytest.CaptureFixture[str]):
    out = compared(capsys, "one", "slow")
    a, b, difference, low, high = numbers(out, "FLOPs")
    one, slow = (curve(base, name)[1][-1] for name in ("one", "slow"))
    assert a == pytest.approx(one, abs=6e-5) and b == pytest.approx(slow, abs=6e-5)
    assert f"one: {one:.4f} bits per byte" in out, "measured again, it equals the recorded value"
    assert difference == pytest.approx(b - a, abs=2e-4) and 0 < low < difference < high
    assert "16 rows, paired" in out and "optim.matrix_lr 0.1 → 0.0001" in out
    assert "at equal FLOPs one is better by" in out and "not what another seed would change" in out
    for file in ("bpb_flops.svg", "bpb_time.svg", "difference.svg"):
        assert ET.parse(base / "compare" / "one_slow" / file).getroot().tag.endswith("svg")
    ranks = gloo.launch(2, "--experiment=compare", "one", "slow", "--set=device=cpu")
    assert ranks[0].split() == out.split() and not ranks[1]


def test_several_seeds_widen_the_interval(base: Path, capsys: pytest.CaptureFixture[str]):
    alone = numbers(compared(capsys, "one", "slow"), "FLOPs")
    out = compared(capsys, "one,one_b", "slow*")
    several = numbers(out, "FLOPs")
    assert several[4] - several[3] > alone[4] - alone[3]
    assert "and the seeds (2 and 2 runs)" in out and "differ in more" not in out
    assert "differ in more than their seed (optim.embedding_lr" in compared(capsys, "one,slow", "one_b")


def test_different_tokenizers_or_contexts_compare_documents(base: Path, capsys: pytest.CaptureFixture[str]):
    out = compared(capsys, "one", "other", tokens=400)
    assert re.search(r"\d+ documents, paired", out) and len(numbers(out, "FLOPs")) == 5
    printed = re.findall(r"^(\w+): (\d\.\d{4}) bits per byte$", out, re.MULTILINE)
    assert [name for name, _ in printed] == ["one", "other"]
    # By hand: each document alone, truncated to both contexts.
    one, other = checkpoint.load("one"), checkpoint.load("other")
    runs = [*experiment.find_runs("one"), *experiment.find_runs("other")]
    nats, n_bytes = 0.0, 0
    for text in experiment.documents(experiment.Config(), runs, [one.tokenizer, other.tokenizer], 400):
        assert len(one.tokenizer.encode(text)) <= 32 and len(other.tokenizer.encode(text)) <= 64
        ids = torch.tensor([[other.tokenizer.bos, *other.tokenizer.encode(text)]])
        logits = model.apply(other.params, ids[:, :-1])
        nats += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
        n_bytes += len(text.encode())
    assert float(printed[1][1]) == pytest.approx(nats / math.log(2) / n_bytes, abs=6e-5)


def test_longer_run_is_read_where_the_shorter_ends(base: Path, capsys: pytest.CaptureFixture[str]):
    out = compared(capsys, "one", "long")
    assert "long is read at 50% of its run" in out and "long: checkpoint of step 14 of 16" in out
    steps, bpb = curve(base, "long")
    assert numbers(out, "FLOPs")[1] == pytest.approx(bpb[steps.index(8)], abs=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("one",), "two arguments"),
        (("one", "nothing"), "no such run"),
        (("one", "x*"), "matches no run"),
        (("one", ","), "names no run"),
        (("one", "blind"), "run blind has no evaluation"),
    ],
)
def test_wrong_arguments(base: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str):
    shutil.copytree(base / "runs" / "one", base / "runs" / "blind", dirs_exist_ok=True)
    (base / "runs" / "blind" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=message):
        compared(capsys, *words)
