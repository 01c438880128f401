"""The experiments data and tokenizer, run as launch.py runs them, on small local sources."""

import dataclasses
import functools
import random
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken

from experiments import data, tokenizer
from nanochat import distributed
from nanochat.config import UserError, override
from nanochat.data import download, embedded, sources
from nanochat.data import tokenizer as bpe


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def cpu() -> distributed.Runtime:
    return distributed.init("cpu", "float32")


def prose(count: int) -> list[str]:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(2, 9))) for _ in range(500)]
    return [" ".join(draw.choices(words, k=60)) + "." for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "texts"
    target.mkdir()
    texts = prose(300)
    embedded.write_shard(target / "shard_00000.parquet", texts[:200])
    embedded.write_shard(target / "shard_00001.parquet", texts[200:])
    return target


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Serve three shards; yields the address."""
    root = tmp_path / "hub"
    root.mkdir()
    for index in (0, 1, download.CLIMBMIX_SHARDS - 1):
        embedded.write_shard(root / download.shard_name(index), prose(20))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_data_downloads_climbmix(cpu: distributed.Runtime, base: Path, hub: str, capsys: pytest.CaptureFixture[str]):
    settings = ["num_shards=2", f"base_url={hub}", "download.workers=2", "bundle_url=none"]
    config = override(data.config(), settings)
    data.run(config, cpu)
    output = capsys.readouterr().out
    assert "3 files fetched now" in output and "train  2 shards" in output and "val    1 shards" in output
    assert output.splitlines()[-1] == "next: torchrun launch.py --experiment=tokenizer"
    assert sorted(path.name for path in (base / "climbmix").iterdir()) == [
        "shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet",
    ]  # fmt: skip
    data.run(config, cpu)
    assert "all of them were there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"shard_00002.parquet: HTTP 404 .*--set num_shards=3`"):
        data.run(override(config, ["num_shards=3"]), cpu)


def test_data_describes_a_folder(cpu: distributed.Runtime, folder: Path, capsys: pytest.CaptureFixture[str]):
    config = override(data.config(), [f"data.source={folder}"])
    data.run(config, cpu)
    output = capsys.readouterr().out
    assert "train  1 shards" in output and prose(1)[0][:60] in output
    assert output.splitlines()[-1] == f"next: torchrun launch.py --experiment=tokenizer --set data.source={folder}"


def test_only_the_main_rank_works(cpu: distributed.Runtime, capsys: pytest.CaptureFixture[str]):
    other = dataclasses.replace(cpu, rank=1, world_size=2)
    for experiment in (data, tokenizer):
        experiment.run(experiment.config(), other)  # there is no data and no tokenizer: rank 0 would complain
    tokenizer.run(tokenizer.Config(eval_only=True), other)
    assert capsys.readouterr().out == ""


def test_tokenizer_trains_saves_and_measures(
    cpu: distributed.Runtime, base: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    config = override(tokenizer.config(), [f"data.source={folder}", "vocab_size=600"])
    tokenizer.run(config, cpu)
    output = capsys.readouterr().out
    tok = bpe.load(base / "tokenizer")
    train = list(sources.texts(config.data, "train"))
    assert tok == bpe.train(train, 600)
    assert f"trained on {sum(map(len, train)):,} characters" in output
    val = list(sources.texts(config.data, "val"))
    size, tokens = sum(map(len, val)), sum(len(tok.encode(text)) for text in val)
    assert f"{size:,} bytes in {tokens:,} tokens, {size / tokens:.3f} bytes per token" in output
    assert "--experiment=pretrain_d20 --set data.source=" in output
    out = base / "other"
    tokenizer.run(override(config, [f"out={out}", "max_chars=20000"]), cpu)
    assert "trained on 20," in capsys.readouterr().out
    assert bpe.load(out) == bpe.train(train, 600, max_chars=20000) != tok


def test_tokenizer_without_data_is_one_line(cpu: distributed.Runtime):
    with pytest.raises(UserError, match="--experiment=data"):
        tokenizer.run(tokenizer.config(), cpu)


def test_eval_only_compares_and_names_what_is_skipped(
    cpu: distributed.Runtime,
    folder: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    tok = bpe.train(prose(300), 600)
    bpe.save(tok, base / "tokenizer")
    hanging = threading.Event()
    one_token_per_byte = bpe.train(prose(1), 265).encoding

    def get_encoding(name: str) -> tiktoken.Encoding:
        if name == "gpt2":
            return one_token_per_byte
        hanging.wait(30)
        raise AssertionError

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    start = time.perf_counter()
    try:
        settings = ["eval_only=true", f"data.source={folder}", "download_seconds=0.2", "eval_chars=3000"]
        tokenizer.run(override(tokenizer.config(), settings), cpu)
    finally:
        hanging.set()
    assert time.perf_counter() - start < 10
    lines = capsys.readouterr().out.splitlines()
    assert "cl100k_base  skipped: tiktoken's download did not finish in 0.2 s" in lines
    rows = {line.split()[0]: line.split() for line in lines[lines.index("") :] if line}
    text = samples()["korean"]
    ours = len(tok.encode(text))
    size = len(text.encode())
    assert rows["korean"] == ["korean", f"{size:,}", f"{size / ours:.3f}", "1.000", f"({size / ours - 1:+.1%})"]
    assert {*tokenizer.SAMPLES, "train", "val"} <= set(rows)
    assert rows["val"][1] == "3,000" and float(rows["val"][2]) > 1.5


def test_eval_only_without_network_and_data(
    cpu: distributed.Runtime, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def get_encoding(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError, match="--experiment=tokenizer"):
        tokenizer.run(tokenizer.Config(eval_only=True), cpu)
    bpe.save(bpe.train(prose(300), 600), base / "tokenizer")
    tokenizer.run(tokenizer.Config(eval_only=True), cpu)
    output = capsys.readouterr().out
    assert "gpt2         skipped: tiktoken could not download it (ConnectionError)" in output
    assert "train        skipped: no climbmix shards" in output
    assert output.splitlines()[-1].split()[0] == "chinese"


def samples() -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in Path(tokenizer.__file__).parent.glob("tokenizer_samples/*")}


def test_samples_are_a_few_paragraphs_of_each_kind():
    assert samples().keys() == set(tokenizer.SAMPLES)
    assert all(len(text.encode()) > 500 and text.count("\n\n") >= 1 for text in samples().values())
