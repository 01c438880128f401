"""The token cache: what comes back is what was written or nothing; ranks share the work and never wait for ever."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import BlockReader, BlockRequest, TokenBlock, loader

TEXTS = ["hello", "", "a longer text", "x" * 500]
TOKENS = [[256, *text.encode()] for text in TEXTS if text]


def block_of(docs: Sequence[Sequence[int]], token_type: Any = np.uint16) -> TokenBlock:
    return TokenBlock(
        np.array([token for doc in docs for token in doc], token_type),
        np.array([len(doc) for doc in docs], np.uint32),
    )


def encode(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array([256, *text.encode()], np.uint32) for text in texts if text]


def docs_of(block: TokenBlock | None) -> list[list[int]]:
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


@given(st.data())
def test_a_damaged_file_is_no_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damage") / "0.tokens"
    loader.write_block(path, block_of(TOKENS))
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "grow"]))
    if kind == "cut":
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    elif kind == "grow":
        path.write_bytes(whole + data.draw(st.binary(min_size=1, max_size=9)))
    else:
        flipped = bytearray(whole)
        flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(flipped)
    block = loader.read_cached(path)
    # A flip in the header's padding harms nothing; whatever is read must be what was written.
    assert block is None or docs_of(block) == TOKENS


@pytest.mark.parametrize("change", [{"docs": 2}, {"docs": 300}, {"tokens": 9}, {"token_bytes": 4}, {"docs": -1}])
def test_a_header_that_does_not_fit_is_no_file(tmp_path: Path, change: dict[str, int]) -> None:
    path = tmp_path / "0.tokens"
    loader.write_block(path, block_of(TOKENS))
    whole = path.read_bytes()
    header = json.loads(whole[:128]) | change
    path.write_bytes(json.dumps(header).encode().ljust(127) + b"\n" + whole[128:])
    assert loader.read_cached(path) is None


class Source:
    """Counts how often its texts are read."""

    def __init__(self, texts: Sequence[str] = TEXTS):
        self.texts, self.reads = texts, 0

    def __call__(self) -> Sequence[str]:
        self.reads += 1
        return self.texts


@pytest.fixture
def readers() -> Iterator[Any]:
    opened: list[BlockReader] = []

    def make(rank: int = 0, world_size: int = 1, **changes: Any) -> BlockReader:
        settings = {"check": lambda: None, "threads": 2} | changes
        reader = BlockReader(encode, np.uint16, rank=rank, world_size=world_size, **settings)
        opened.append(reader)
        return reader

    yield make
    for reader in opened:
        reader.close()


def get(reader: BlockReader, request: BlockRequest) -> list[list[int]]:
    return docs_of(reader.result(request, reader.start(request)))


def test_tokenises_once_then_reads_the_cache(tmp_path: Path, readers: Any) -> None:
    source, path = Source(), tmp_path / "0.tokens"
    assert get(readers(), BlockRequest(path, source, 0)) == TOKENS
    assert get(readers(), BlockRequest(path, source, 0)) == TOKENS
    assert source.reads == 1
    path.write_bytes(path.read_bytes()[:-1])
    assert get(readers(), BlockRequest(path, source, 0)) == TOKENS
    assert source.reads == 2 and docs_of(loader.read_cached(path)) == TOKENS, "the damaged file was not replaced"


def test_without_a_path_nothing_is_written(tmp_path: Path, readers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Source()
    assert get(readers(rank=1, world_size=4), BlockRequest(None, source, 0)) == TOKENS
    assert source.reads == 1 and list(tmp_path.iterdir()) == []


def test_documents_keep_their_order_over_many_chunks(readers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CHUNK_CHARS", 100)
    assert [len(chunk) for chunk in loader._text_chunks(["x" * 30] * 10)] == [3, 3, 3, 1]
    texts = [f"document {i}" * (i % 7) for i in range(500)]
    expected = [[256, *text.encode()] for text in texts if text]
    assert get(readers(threads=4), BlockRequest(None, Source(texts), 0)) == expected


def test_ranks_share_the_work(tmp_path: Path, readers: Any) -> None:
    sources = [Source() for _ in range(12)]
    requests = [BlockRequest(tmp_path / f"{i}.tokens", source, i) for i, source in enumerate(sources)]
    ranks = [readers(rank, 3) for rank in range(3)]
    futures = [[reader.start(request) for request in requests] for reader in ranks]
    for reader, started in zip(ranks, futures):
        assert [docs_of(reader.result(r, f)) for r, f in zip(requests, started)] == [TOKENS] * 12
    assert [source.reads for source in sources] == [1] * 12


def test_processes_fill_one_cache_together(tmp_path: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        import numpy as np
        from nanochat.data.loader import BlockReader, BlockRequest as Request
        rank, world_size = map(int, sys.argv[1:])
        def encode(texts):
            return [np.array([256, *text.encode()], np.uint32) for text in texts]
        reader = BlockReader(encode, np.uint16, check=lambda: None, threads=1, rank=rank, world_size=world_size)
        requests = [Request(Path({str(tmp_path)!r}) / str(i), lambda i=i: [str(i)] * 1000, i) for i in range(30)]
        started = [reader.start(request) for request in requests]
        for i, (request, future) in enumerate(zip(requests, started)):
            block = reader.result(request, future)
            expected = [256, *str(i).encode()] * 1000
            assert block.tokens.tolist() == expected and len(block.lengths) == 1000, i
    """
    places = [(0, 1), (0, 1), (0, 2), (1, 2)]  # two that know nothing of each other, and a pair
    code = textwrap.dedent(program)
    processes = [subprocess.Popen([sys.executable, "-c", code, str(r), str(n)]) for r, n in places]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(30)))
    assert all(loader.read_cached(path) for path in tmp_path.iterdir())


def test_goes_on_without_a_rank_that_is_gone(tmp_path: Path, readers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "OTHERS_WAIT_SECONDS", 0.3)
    requests = [BlockRequest(tmp_path / f"{i}.tokens", Source(), i) for i in range(20)]
    reader = readers(rank=0, world_size=3)
    started = time.monotonic()
    assert [get(reader, request) for request in requests] == [TOKENS] * 20
    seconds = time.monotonic() - started
    assert 0.6 <= seconds < 3, f"waited {seconds:.1f} s: once for each of the two is right"


def test_a_rank_is_not_given_up_for_a_block_that_nobody_can_read(
    tmp_path: Path, readers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "OTHERS_WAIT_SECONDS", 0.1)

    def bad() -> list[str]:
        raise ValueError("unreadable")

    reader = readers(rank=0, world_size=2)
    request = BlockRequest(tmp_path / "1.tokens", bad, 1)
    with pytest.raises(ValueError, match="unreadable"):
        reader.result(request, reader.start(request))
    monkeypatch.setattr(loader, "OTHERS_WAIT_SECONDS", 10)
    source = Source()
    request = BlockRequest(tmp_path / "3.tokens", source, 3)
    late = threading.Timer(0.3, loader.write_block, (request.path, block_of(TOKENS)))
    late.start()
    assert get(reader, request) == TOKENS and source.reads == 0, "it should have waited for the other rank"


def test_a_full_disk_ends_caching_with_one_warning(
    tmp_path: Path, readers: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    both = threading.Barrier(2, timeout=10)  # the first two blocks fail at the same time

    def full(*_: Any) -> None:
        both.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loader.os, "replace", full)
    reader = readers()
    requests = [BlockRequest(tmp_path / f"{i}.tokens", Source(), i) for i in range(6)]
    started = [reader.start(request) for request in requests[:2]]
    assert [docs_of(reader.result(*pair)) for pair in zip(requests, started)] == [TOKENS] * 2
    assert [get(reader, request) for request in requests[2:]] == [TOKENS] * 4
    assert list(tmp_path.iterdir()) == [], "what was written of the block takes the last of the disk"
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and str(tmp_path) in warnings[0]


def test_errors_keep_their_type(readers: Any) -> None:
    class Odd(Exception):
        pass

    def stop() -> None:
        raise Odd

    reader = readers(check=stop)
    with pytest.raises(Odd):
        get(reader, BlockRequest(None, Source(), 0))
