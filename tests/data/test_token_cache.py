"""The token cache: what is read is what was written or nothing; no rank waits forever for another."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import DataConfig, Tokenizer, loader, sources

TOK = Tokenizer(tuple(bytes([i]) for i in range(256)))
TEXTS = ["hello", "a longer text", "x" * 500]
TOKENS = [[256, *text.encode()] for text in TEXTS]
REFS = [loader.BlockRef(0, 0, i, 0, i) for i in range(40)]


def block_of(docs: Sequence[Sequence[int]], token_type: Any = np.uint16) -> loader.TokenBlock:
    tokens = np.array([token for doc in docs for token in doc], token_type)
    return loader.TokenBlock(tokens, np.array([len(doc) for doc in docs], np.uint32))


def docs_of(block: loader.TokenBlock | None) -> list[list[int]]:
    assert block is not None
    return [doc.tolist() for doc in np.split(block.tokens, np.cumsum(block.lengths)[:-1])] if len(block.lengths) else []


@pytest.mark.parametrize("token_type", [np.uint16, np.uint32])
@pytest.mark.parametrize("docs", [TOKENS, [[7]], []])
def test_reads_what_was_written(tmp_path: Path, docs: list[list[int]], token_type: Any) -> None:
    path = tmp_path / "new" / "000000.tokens"
    assert loader.read_cached(path) is None
    loader.write_block(path, block_of(docs, token_type))
    block = loader.read_cached(path)
    assert docs_of(block) == docs
    assert block is not None and block.tokens.dtype == token_type and not block.tokens.flags.writeable
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a temporary file was left"


@given(st.sampled_from(["cut", "flip", "grow"]), st.integers(0, 10**6))
def test_corrupt_file_counts_as_missing(tmp_path_factory: pytest.TempPathFactory, kind: str, number: int) -> None:
    path = tmp_path_factory.mktemp("corrupt") / "0.tokens"
    loader.write_block(path, block_of(TOKENS))
    content = bytearray(path.read_bytes())
    position = number % len(content)
    if kind == "flip":
        content[position] ^= 1 << number % 8
    path.write_bytes({"cut": content[:position], "flip": content, "grow": content + content[: position + 1]}[kind])
    block = loader.read_cached(path)
    # A flip in the header's padding harms nothing; whatever is read must be what was written.
    assert block is None or (kind == "flip" and docs_of(block) == TOKENS)


Readers = Callable[..., loader.BlockReader]


@pytest.fixture
def readers(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Readers]:
    """Makes readers of one shard; all of its blocks hold TEXTS."""
    monkeypatch.setattr(loader, "read_block", lambda *_: TEXTS)
    monkeypatch.setattr(loader, "content_hash", lambda *_: "0" * 64)
    shards = (sources.Shard(base / "0.jsonl", "fingerprint"),)
    opened: list[loader.BlockReader] = []

    def make(rank: int = 0, world_size: int = 1, **config: Any) -> loader.BlockReader:
        data = DataConfig(tokenizer_threads=2, **config)
        stream = loader.StreamConfig(data, TOK, "train", shards, 0, 25, rank, world_size, [])
        opened.append(loader.BlockReader(stream))
        return opened[-1]

    yield make
    for reader in opened:
        reader.close()


def read(reader: loader.BlockReader, ref: loader.BlockRef) -> list[list[int]]:
    return docs_of(reader.request(ref)())


def test_continues_without_a_dead_rank(readers: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "OTHER_RANK_SECONDS", 0.3)
    reader = readers(rank=0, world_size=3)
    started = time.monotonic()
    assert [read(reader, ref) for ref in REFS[:20]] == [TOKENS] * 20
    seconds = time.monotonic() - started
    assert 0.6 <= seconds < 5, f"waited {seconds:.1f} s: once for each of the two is right"


def test_unreadable_block_does_not_mark_rank_dead(readers: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "OTHER_RANK_SECONDS", 0.1)
    monkeypatch.setattr(loader, "read_block", mock.Mock(side_effect=ValueError("unreadable")))
    reader = readers(rank=0, world_size=2)
    with pytest.raises(ValueError, match="unreadable"):
        read(reader, REFS[1])
    monkeypatch.setattr(loader, "OTHER_RANK_SECONDS", 100)
    late = threading.Timer(0.3, loader.write_block, (reader.cache_path(REFS[3]), block_of(TOKENS)))
    late.start()
    assert read(reader, REFS[3]) == TOKENS, "it should have waited for the other rank"


def test_full_disk_stops_caching_with_one_warning(
    tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    both = threading.Barrier(2, timeout=100)  # the first two blocks fail at the same time

    def full(*_: Any) -> None:
        both.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loader.os, "replace", full)
    reader = readers()
    started = [reader.request(ref) for ref in REFS[:2]]
    assert [docs_of(get_block()) for get_block in started] == [TOKENS] * 2
    assert [read(reader, ref) for ref in REFS[2:6]] == [TOKENS] * 4
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "a partial block fills the disk"
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and str(tmp_path) in warnings[0]
