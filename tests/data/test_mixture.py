"""Mixtures of sources: shares, the same rows on any number of ranks, resumes, and training on them."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from experiments import eval_base
from nanochat import distributed
from nanochat.config import UserError
from nanochat.data import DataConfig, Tokenizer, loader, mixture, sources
from nanochat.metrics import logger

TOK = Tokenizer(tuple(bytes([i]) for i in range(256)))
BOS = 256
ALPHABETS = {"first": "abcdefgh", "second": "ijklmnop", "with,comma": "qrstuvwx"}
SHARES = (0.7, 0.2, 0.1)

pytestmark = pytest.mark.usefixtures("base")


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Three folders, of different letters and lengths of documents, the last of few."""
    rng = random.Random(0)
    for (name, letters), (docs, length) in zip(ALPHABETS.items(), ((400, 30), (400, 200), (20, 9)), strict=True):
        (tmp_path / name).mkdir()
        for shard in ("a", "b", "val"):
            texts = ("".join(rng.choices(letters, k=rng.randint(1, length))) for _ in range(docs))
            (tmp_path / name / f"{shard}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return f"7*{tmp_path}/first, 2*{tmp_path}/second,1*{tmp_path}/with\\,comma"


def batches(source: str, rows: int, **options: Any) -> Any:
    config = DataConfig(source=source, buffer_docs=16, token_cache=False, tokenizer_threads=1)
    options = {"split": "train", "sequence_len": 24, "seed": 3} | options
    return loader.batches(config, TOK, rows_per_step=rows, **options)


def take(stream: Any, count: int) -> tuple[np.ndarray, Any]:
    """Return the rows of so many batches, and the last state."""
    items = list(itertools.islice(stream, count))
    stream.close()
    return np.concatenate([batch["inputs"].numpy() for batch, *_ in items]), items[-1][1]


def sources_of(rows: np.ndarray) -> np.ndarray:
    """Return the number of each row's source, by its letters, of which no row has those of two."""
    kinds = (np.where(rows == BOS, 0, rows) - ord("a")) // 8
    for row, kind in zip(rows, kinds):
        assert len(set(kind[row != BOS])) == 1
    return np.where(rows == BOS, -1, kinds).max(1)


def test_shares_over_10000_rows_and_the_rows_of_each_source_alone(source: str):
    rows, state = take(batches(source, 1000), 10)
    kinds = sources_of(rows)
    for n in (100, 1000, 10_000):
        counts = np.bincount(kinds[:n], minlength=3)
        assert np.abs(counts - n * np.array(SHARES)).max() <= 1, counts
    assert [p["rows"] for p in state["position"]["sources"]] == [7000, 2000, 1000]
    for kind, name in enumerate(name for _, name in mixture.parse(source)):
        alone, _ = take(batches(name, 1000), 2)
        assert np.array_equal(rows[kinds == kind][:1000], alone[:1000])
    lines = mixture.notes(state["position"])
    assert lines[0].startswith("70.00% of the tokens from ") and "second: " in lines[1]
    assert int(lines[2].rpartition(" ")[2]) > 5, "the small source is read many times"


@pytest.mark.parametrize("world_size", [2, 4])
def test_same_rows_on_any_number_of_ranks_also_resumed(source: str, world_size: int):
    whole, _ = take(batches(source, 8), 30)
    parts = [take(batches(source, 8, rank=rank, world_size=world_size), 10) for rank in range(world_size)]
    states = [state for _, state in parts]
    for state in states[1:]:
        assert state["position"] == states[0]["position"] and np.array_equal(state["tokens"], states[0]["tokens"])
    saved = states[0] | {"position": json.loads(json.dumps(states[0]["position"]))}
    assert np.array_equal(np.stack([rows for rows, _ in parts], 1).reshape(80, -1), whole[:80])
    rest = [
        take(batches(source, 8, rank=r, world_size=8 // world_size, state=saved), 20)[0] for r in range(8 // world_size)
    ]
    assert np.array_equal(np.stack(rest, 1).reshape(160, -1), whole[80:])


def test_state_before_a_source_had_its_first_row(source: str):
    whole, _ = take(batches(source, 1), 30)
    for steps in (1, 2, 5):
        _, state = take(batches(source, 1), steps)
        rest, _ = take(batches(source, 1, state=state), 30 - steps)
        assert np.array_equal(rest, whole[steps:])


def test_other_shares_or_sources_are_other_data(source: str):
    _, state = take(batches(source, 8), 1)
    with pytest.raises(loader.OtherDataError, match=r"share was 0.7, is 0.6"):
        batches(source.replace("7*", "6*").replace("2*", "3*"), 8, state=state)
    with pytest.raises(loader.OtherDataError, match="1 sources of data, there were 3"):
        batches(mixture.parse(source)[0][1], 8, state=state)


@pytest.mark.parametrize("text", ["0.5*a,b", "0*a,1*b", "1*a,,1*b", "1*a,1*a", "1*a,-1*b"])
def test_what_is_no_mixture_is_refused(text: str):
    with pytest.raises(UserError, match=r"data.source=.*(no weight above 0 and a source|named twice)"):
        sources.parts_of(DataConfig(source=text))


def test_texts_for_a_tokenizer_come_by_turns(source: str):
    texts = list(itertools.islice(sources.texts(DataConfig(source=source), "train"), 300))
    chars = [sum(len(t) for t in texts if t[0] in letters) for letters in ALPHABETS.values()]
    assert chars[0] / sum(chars) == pytest.approx(0.7, abs=0.05) and min(chars) > 0


@pytest.mark.slow
def test_pretraining_goes_on_with_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str):
    (tmp_path / "base").mkdir()
    with tiny_run.base_folder(tmp_path / "base") as base:
        tiny_run.pretrain_run("name=old")
        mixed = f"data.source=0.75*{base / 'text'},0.25*{tmp_path / 'second'}"
        settings = (mixed, "init_from=old", "num_iterations=12", "eval.tokens=512")
        capsys.readouterr()
        whole = tiny_run.pretrain_run("name=whole", *settings)
        out = capsys.readouterr().out
        assert "the data, or its order, is not that of old: it is read from its beginning" in out
        assert "75.0% of the tokens from " in out.partition("run folder")[0]
        assert "75.00% of the tokens from " in out and "25.00% of the tokens from " in out
        with tiny_run.stop_after(8):
            tiny_run.pretrain_run("name=stopped", *settings)
        stopped = tiny_run.pretrain_run("name=stopped", "resume=true", *settings)
        tiny_run.assert_same_run(whole, stopped)
        last = logger.read(whole)[-1] | {"bpb": logger.curve(logger.read(whole), "val/bpb")[1][-1]}
        by_source = [logger.curve(logger.read(whole), f"val/bpb/{name}")[1][-1] for name in ("text", "second")]
        assert min(by_source) < last["bpb"] < max(by_source)
        capsys.readouterr()
        eval_base.run(
            eval_base.Config(run="whole", tasks=("bpb",), tokens=512, device="cpu"), distributed.init("cpu", "float32")
        )
        assert "bits per byte of 0.75*" in capsys.readouterr().out
