"""Comparing runs: the statistics against simulations and tables, and the experiment on tiny runs."""

import dataclasses
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as gloo
import small_corpus
import torch

from experiments import compare as experiment
from experiments import pretrain
from nanochat import checkpoint, distributed, model
from nanochat.config import UserError, override
from nanochat.data import tokenizer
from nanochat.eval import significance
from nanochat.metrics import logger, run_folder
from nanochat.train import stage as runs


@pytest.mark.parametrize(
    ("freedom", "t"),
    # From printed tables of Student's t, two-sided 95%.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (120, 1.980), (math.inf, 1.960)],
)
def test_the_quantiles_are_those_of_the_tables(freedom: float, t: float) -> None:
    assert significance.t_quantile(freedom) == pytest.approx(t, abs=6e-4)


def test_quantiles_at_another_level_and_between_whole_numbers() -> None:
    assert significance.t_quantile(5, 0.99) == pytest.approx(4.032, abs=6e-4)
    assert significance.t_quantile(4, 0.95) > significance.t_quantile(4.5, 0.95) > significance.t_quantile(5, 0.95)


def texts(draws: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nats of two models and bytes of n pieces whose hardness varies ten times as much as the models differ."""
    sizes = draws.integers(200, 2000, n).astype(float)
    hardness = draws.normal(0.7, 0.2, n)
    a = sizes * (hardness + draws.normal(0, 0.02, n))
    b = sizes * (hardness - 0.01 + draws.normal(0, 0.02, n))
    return a, b, sizes


def test_the_difference_is_that_of_bits_per_byte_and_its_error_that_of_a_bootstrap() -> None:
    draws = np.random.default_rng(0)
    a, b, sizes = texts(draws, 400)
    difference, error = significance.paired(a, b, sizes)
    scale = math.log(2) * sizes.sum()
    assert difference == pytest.approx(b.sum() / scale - a.sum() / scale)
    again = []
    for _ in range(2000):
        chosen = draws.integers(0, 400, 400)
        again.append((b - a)[chosen].sum() / sizes[chosen].sum() / math.log(2))
    assert error == pytest.approx(np.std(again), rel=0.08)
    alone = a / sizes / math.log(2)
    assert error < 0.2 * alone.std() / math.sqrt(400), "pairs take most of the noise out"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    held = 0
    for _ in range(600):
        a, b, sizes = texts(draws, 60)
        difference, error = significance.paired(a, b, sizes)
        found = significance.interval([0.0], [difference], error, 60)
        held += found.low <= -0.01 / math.log(2) <= found.high
        assert found.seed_error is None
    assert 0.93 < held / 600 < 0.97


@pytest.mark.parametrize(("runs_a", "runs_b"), [(3, 3), (1, 4), (2, 5)])
def test_with_several_seeds_the_interval_covers_seeds_and_text(runs_a: int, runs_b: int) -> None:
    draws = np.random.default_rng(2)
    truth, seed_noise, held, tries = 0.003, 0.004, 0, 600
    for _ in range(tries):
        text = draws.normal(0, 0.002)  # what the choice of text adds to all differences alike
        a = list(1.0 + draws.normal(0, seed_noise, runs_a))
        b = list(1.0 + truth + text + draws.normal(0, seed_noise, runs_b))
        found = significance.interval(a, b, 0.002, 400)
        held += found.low <= truth <= found.high
    # Welch's approximation is known to be a few points off where a group has two or three.
    assert 0.92 < held / tries <= 0.995


def test_seeds_widen_the_interval() -> None:
    one = significance.interval([1.0], [1.01], 0.002, 100)
    several = significance.interval([1.0, 1.004, 0.996], [1.01, 1.006, 1.014], 0.002, 100)
    assert one.difference == pytest.approx(several.difference) and one.told
    assert several.low < one.low and several.seed_error == pytest.approx(math.sqrt(2 * 0.004**2 / 3))
    equal = significance.interval([1.0], [1.0], 0.0, 100)
    assert (equal.difference, equal.low, equal.high, equal.told) == (0, 0, 0, False)


def test_interpolation_is_over_the_logarithm_and_never_beyond_the_ends() -> None:
    xs, ys = [1.0, 100.0], [3.0, 1.0]
    assert significance.at(xs, ys, 10.0) == pytest.approx(2.0)
    assert significance.at(xs, ys, 100.0) == pytest.approx(1.0)
    assert (
        significance.at(xs, ys, 101.0) is None
        and significance.at(xs, ys, 0.5) is None
        and significance.at([], [], 1.0) is None
    )


def test_two_pieces_are_the_least() -> None:
    with pytest.raises(ValueError, match="two pieces"):
        significance.paired(np.ones(1), np.ones(1), np.ones(1))


# The experiment


TINY = (
    *("compile=false", "device=cpu", "model.sequence_len=32", "model.aspect_ratio=32", "model.head_dim=32"),
    *("model.window_pattern=L", "depth=1", "device_batch_size=4", "total_batch_size=256", "num_iterations=8"),
    *("checkpoint.every_steps=4", "eval.every_steps=2", "eval.tokens=512", "eval.sample_tokens=2", "eval.prompts=the"),
    *("metrics.every_steps=1", "core.every_steps=none", "train.chunk_tokens=50", "data.buffer_docs=20"),
    *("optim.matrix_lr=0.1", "optim.warmup_steps=2"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with two seeds of a run, one of other rates, one of another context, one of twice the length."""
    folder = tmp_path_factory.mktemp("base")
    texts = small_corpus.write(folder)
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
    row = next(line for line in out.splitlines() if line.startswith(f"{axis}:"))
    return [float(x) for x in re.findall(r"[+-]?\d+\.\d{4}\b", row)]


def test_a_run_and_itself_do_not_differ(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compared(capsys, "one", "one")
    assert numbers(out, "FLOPs")[2:] == numbers(out, "time")[2:] == [0, 0, 0]
    assert out.count("no difference can be told") == 2 and "none but name and seed" in out


def test_rows_give_the_numbers_of_the_runs_own_evaluations(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compared(capsys, "one", "slow")
    a, b, difference, low, high = numbers(out, "FLOPs")
    last = {name: logger.curve(logger.read(base / "runs" / name), "val/bpb")[1][-1] for name in ("one", "slow")}
    assert a == pytest.approx(last["one"], abs=6e-5) and b == pytest.approx(last["slow"], abs=6e-5)
    assert f"one: {last['one']:.4f} bits per byte" in out, "measured anew, it is what was recorded"
    assert difference == pytest.approx(b - a, abs=2e-4) and low < difference < high and low > 0
    assert "16 rows, paired" in out and "optim.matrix_lr 0.1 → 0.0001" in out
    assert "at equal FLOPs one is better by" in out and "not what another seed would change" in out
    for file in ("bpb_flops.svg", "bpb_time.svg", "difference.svg"):
        assert ET.parse(base / "compare" / "one_slow" / file).getroot().tag.endswith("svg")


def test_several_seeds_a_side(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = numbers(compared(capsys, "one", "slow"), "FLOPs")
    out = compared(capsys, "one,one_b", "slow*")
    several = numbers(out, "FLOPs")
    assert several[4] - several[3] > alone[4] - alone[3]
    assert "and the seeds (2 and 2 runs)" in out and "differ in more" not in out
    assert "differ in more than their seed (optim.embedding_lr" in compared(capsys, "one,slow", "one_b")


def test_other_tokenizers_and_contexts_are_compared_by_documents(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = compared(capsys, "one", "other", tokens=400)
    assert re.search(r"\d+ documents, paired", out) and len(numbers(out, "FLOPs")) == 5
    there = re.findall(r"^(\w+): (\d\.\d{4}) bits per byte$", out, re.MULTILINE)
    assert [name for name, _ in there] == ["one", "other"]
    # By hand: each document alone, cut to what both contexts hold, its nats summed one token after the other.
    records = [run_folder.read_run(base / "runs" / name) for name in ("one", "other")]
    toks = [experiment.tokenizer_of(one, one.step) for one in records]
    texts = experiment.documents(experiment.config(), [(one, one.step) for one in records], toks, 400)
    for text in texts:
        assert len(toks[0].encode(text)) <= 32 and len(toks[1].encode(text)) <= 64
    bot = checkpoint.load("other")
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[bot.tokenizer.bos, *bot.tokenizer.encode(text)]])
        logits = model.apply(bot.params, ids[:, :-1], config=bot.config)
        nats += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    assert float(there[1][1]) == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in texts), abs=6e-5)


def test_a_longer_run_is_read_where_the_shorter_ends(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compared(capsys, "one", "long")
    assert "long is read at 50% of its run" in out and "long: checkpoint of step 14 of 16" in out
    steps, bpb = logger.curve(logger.read(base / "runs" / "long"), "val/bpb")
    assert numbers(out, "FLOPs")[1] == pytest.approx(bpb[steps.index(8)], abs=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("one",), "two words"),
        (("one", "nothing"), "no such run"),
        (("one", "x*"), "matches no run"),
        (("one", ","), "names no run"),
    ],
)
def test_mistakes(base: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compared(capsys, *words)


def test_runs_that_cannot_be_compared_are_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = base / "runs" / "blind"
    shutil.copytree(base / "runs" / "one", blind)
    (blind / "metrics.jsonl").write_text("")
    try:
        with pytest.raises(UserError, match="run blind has no evaluation"):
            compared(capsys, "one", "blind")
    finally:
        shutil.rmtree(blind)


def test_two_ranks_say_what_one_says(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = compared(capsys, "one", "slow")
    outs = gloo.launch(2, "--experiment=compare", "one", "slow", "--set=device=cpu")
    assert not outs[1]
    assert [line for line in outs[0].splitlines() if line] == [line for line in alone.splitlines() if line]
