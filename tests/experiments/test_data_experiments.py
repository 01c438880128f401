"""The experiments data and tokenizer on small local sources."""

import dataclasses
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from experiments import data, tokenizer
from nanochat import distributed
from nanochat.config import UserError
from nanochat.data import DataConfig, download, embedded, sources
from nanochat.data import tokenizer as bpe


def run(config: data.Config | tokenizer.Config, **rank: int) -> None:
    experiment: Any = data if isinstance(config, data.Config) else tokenizer
    experiment.run(config, dataclasses.replace(distributed.init("cpu", "float32"), **rank))


def prose(count: int) -> list[str]:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(2, 9))) for _ in range(500)]
    return [" ".join(draw.choices(words, k=60)) + "." for _ in range(count)]


@pytest.fixture
def source(base: Path) -> DataConfig:
    (base / "texts").mkdir()
    for index, texts in enumerate((prose(300)[:200], prose(300)[200:])):
        embedded.write_shard(base / "texts" / download.shard_name(index), texts)
    return DataConfig(str(base / "texts"))


def test_data_downloads_climbmix(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def climbmix(folder: Path, num_shards: int, options: Any, *, base_url: str) -> int:
        assert (num_shards, base_url) == (2, "http://mirror")
        folder.mkdir()
        for index in (0, 1, download.CLIMBMIX_SHARDS - 1):
            embedded.write_shard(folder / download.shard_name(index), prose(20))
        return 3

    monkeypatch.setattr(download, "climbmix", climbmix)
    run(data.Config(num_shards=2, base_url="http://mirror", bundle_url=None))
    output = capsys.readouterr().out
    assert "3 files fetched now" in output and "train  2 shards" in output and "val    1 shards" in output
    assert output.splitlines()[-1] == "next: torchrun launch.py --experiment=tokenizer"


def test_data_describes_a_folder(source: DataConfig, capsys: pytest.CaptureFixture[str]):
    run(data.Config(source))
    output = capsys.readouterr().out
    assert "train  1 shards" in output and prose(1)[0][:60] in output
    assert output.splitlines()[-1].endswith(f"--experiment=tokenizer --set data.source={source.source}")


def test_only_the_main_rank_works(base: Path, capsys: pytest.CaptureFixture[str]):
    run(data.Config(), rank=1, world_size=2)  # there is no data and no tokenizer: rank 0 would complain
    run(tokenizer.Config(), rank=1, world_size=2)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--experiment=data"):
        run(tokenizer.Config())
    with pytest.raises(UserError, match="--experiment=tokenizer"):
        run(tokenizer.Config(eval_only=True))


def test_tokenizer_trains_saves_and_measures(base: Path, source: DataConfig, capsys: pytest.CaptureFixture[str]):
    config = tokenizer.Config(source, vocab_size=600)
    run(config)
    output = capsys.readouterr().out
    tok = bpe.load(base / "tokenizer")
    train = list(sources.texts(source, "train"))
    assert tok == bpe.train(train, 600)
    assert f"trained on {sum(map(len, train)):,} characters" in output
    val = list(sources.texts(source, "val"))
    size, tokens = sum(map(len, val)), sum(len(tok.encode(text)) for text in val)
    assert f"{size:,} bytes in {tokens:,} tokens, {size / tokens:.3f} bytes per token" in output
    assert "--experiment=pretrain_d20 --set data.source=" in output
    run(dataclasses.replace(config, out=str(base / "other"), max_chars=20000))
    assert "trained on 20," in capsys.readouterr().out
    assert bpe.load(base / "other") == bpe.train(train, 600, max_chars=20000) != tok


def test_eval_only_compares_and_names_what_is_skipped(base: Path, source: DataConfig, monkeypatch, capsys):
    hanging, gpt2 = threading.Event(), bpe.train(prose(1), 265).encoding  # one token per byte

    def get_encoding(name: str) -> tiktoken.Encoding:
        if name == "cl100k_base":
            hanging.wait(30)
            raise ConnectionError
        return gpt2

    tok = bpe.train(prose(300), 600)
    bpe.save(tok, base / "tokenizer")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    config = tokenizer.Config(source, eval_only=True, download_seconds=0.2, eval_chars=3000)
    run(config)
    hanging.set()
    lines = capsys.readouterr().out.splitlines()
    assert "cl100k_base  skipped: tiktoken's download did not finish in 0.2 s" in lines
    rows = {line.split()[0]: line.split() for line in lines[lines.index("") :] if line}
    text = (Path(tokenizer.__file__).parent / "tokenizer_samples" / "korean.txt").read_text("utf-8")
    tokens, size = len(tok.encode(text)), len(text.encode())
    assert rows["korean"] == ["korean", f"{size:,}", f"{size / tokens:.3f}", "1.000", f"({size / tokens - 1:+.1%})"]
    assert {*tokenizer.SAMPLES, "train", "val"} <= set(rows)
    assert rows["val"][1] == "3,000" and float(rows["val"][2]) > 1.5
    run(dataclasses.replace(config, data=DataConfig()))
    output = capsys.readouterr().out
    assert "cl100k_base  skipped: tiktoken could not download it (ConnectionError)" in output
    assert "train        skipped: no climbmix shards" in output
