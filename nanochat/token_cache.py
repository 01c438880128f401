"""Blocks of tokenised documents: kept on disk, made when they are not there, shared between ranks, read ahead.

One block is one file: a line of JSON padded to 128 bytes, then the documents' lengths (uint32), then their tokens one
after another (uint16 or uint32), all little-endian. It is written in one piece and checked whole when read; a file
that is missing, cut short or damaged is made again. The folder may be deleted at any time.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORMAT = "nanochat-tokens-1"
HEADER_BYTES = 128
BLOCKS_AT_ONCE = 2  # as one block ends, the next keeps the tokenising threads busy
CHUNK_CHARS = 100_000  # that a thread tokenises in one go
OTHERS_WAIT_SECONDS = 10.0  # for a block that another rank should tokenise
OTHERS_POLL_SECONDS = 0.01


class Block(NamedTuple):
    """Tokenised documents.

    Attributes:
        tokens: the documents' tokens one after another, uint16 or uint32, (sum of lengths,).
        lengths: tokens of each document, uint32, (documents,).
    """

    tokens: np.ndarray
    lengths: np.ndarray


def write(path: Path, block: Block) -> None:
    """Write `block` so that `path` is complete if it exists, whoever else writes it; OSError if that fails."""
    size = block.tokens.itemsize
    data = block.lengths.astype("<u4").tobytes() + block.tokens.astype(f"<u{size}").tobytes()
    header = {
        "format": FORMAT,
        "docs": len(block.lengths),
        "tokens": len(block.tokens),
        "token_bytes": size,
        "crc32": zlib.crc32(data),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("wb") as file:
            file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read(path: Path) -> Block | None:
    """Return what `write` put there, as read-only arrays, or None if the file is missing or not exactly that."""
    try:
        data = path.read_bytes()
        header = json.loads(data[:HEADER_BYTES])
        docs, size, token_bytes = header["docs"], header["tokens"], header["token_bytes"]
        sound = (
            header["format"] == FORMAT
            and token_bytes in (2, 4)
            and len(data) == HEADER_BYTES + 4 * docs + token_bytes * size
            and header["crc32"] == zlib.crc32(memoryview(data)[HEADER_BYTES:])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not sound:
        return None
    lengths = np.frombuffer(data, "<u4", docs, HEADER_BYTES)
    tokens = np.frombuffer(data, f"<u{token_bytes}", size, HEADER_BYTES + 4 * docs)
    return Block(tokens, lengths) if int(lengths.sum(dtype=np.int64)) == size else None


class Request(NamedTuple):
    """A block to get.

    Attributes:
        path: its file in the cache; None reads and writes none.
        texts: reads its documents; called in a thread, when the file is not there.
        turn: which of the ranks that share the cache tokenises it, modulo their number. Equal on all ranks.
    """

    path: Path | None
    texts: Callable[[], Sequence[str]]
    turn: int


class BlockReader:
    """Gets blocks in threads of its own, from the cache or by tokenising.

    Of the blocks that are not cached each rank tokenises its share and reads the others' once they appear. It waits a
    bounded time for them and then tokenises itself, so that nothing can lock up whatever becomes of the other ranks:
    one may be gone, have a disk of its own, or a full one.

    Args:
        encode: gives the tokens of some texts, an array for each that has any; called in many threads.
        token_type: np.uint16 or np.uint32, in which blocks hold them.
        check: called between pieces of work, in any thread; what it raises ends the work.
        threads: threads that tokenise; None: one per core.
        rank, world_size: which of how many processes this is that use the cache at the same time.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Sequence[np.ndarray]],
        token_type: type[np.unsignedinteger],
        *,
        check: Callable[[], None],
        threads: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._encode, self._token_type = encode, token_type
        self._check = check
        self._rank, self._sharers = rank, list(range(world_size))
        self._writing, self._lock = True, threading.Lock()
        self._block_threads = ThreadPoolExecutor(BLOCKS_AT_ONCE, "read-block")
        self._encode_threads = ThreadPoolExecutor(threads or _cores(), "tokenize")

    def start(self, request: Request) -> Future[Block] | None:
        """Begin with a block if this rank has to tokenise it. Give what is returned to `result`."""
        if request.path is None or (self._whose(request) == self._rank and not os.path.exists(request.path)):
            return self._block_threads.submit(self._tokenize, request)
        return None

    def result(self, request: Request, started: Future[Block] | None) -> Block:
        """Return the block, waiting for it; raises what `request.texts` raises."""
        if started:
            return started.result()
        assert request.path, "start() has started it"
        whose = self._whose(request)
        deadline = time.monotonic() + OTHERS_WAIT_SECONDS
        # Reading is quick, and quicker here than in a thread that has to get hold of the interpreter first.
        while not (block := read(request.path)):
            if whose == self._rank or time.monotonic() > deadline:
                block = self._tokenize(request)
                # It could be read, so that rank is just late, or gone: no more waiting for it.
                self._sharers = [rank for rank in self._sharers if rank != whose or rank == self._rank]
                break
            self._check()
            time.sleep(OTHERS_POLL_SECONDS)
        return block

    def close(self) -> None:
        """Let the threads end. Work under way is not waited for."""
        for pool in (self._block_threads, self._encode_threads):
            pool.shutdown(wait=False, cancel_futures=True)

    def _whose(self, request: Request) -> int:
        return self._sharers[request.turn % len(self._sharers)]

    def _tokenize(self, request: Request) -> Block:
        self._check()
        texts = request.texts()
        blocks = self._encode_threads.map(self._encode_chunk, _chunks(texts))
        block = Block(*map(np.concatenate, zip(*blocks)))
        if request.path and self._writing:
            try:
                write(request.path, block)
            except OSError as error:
                self._give_up_writing(request.path.parent, error)
        return block

    def _give_up_writing(self, folder: Path, error: OSError) -> None:
        with self._lock:
            told, self._writing = not self._writing, False
        if not told:
            why = f"{folder} cannot be written ({error.strerror})"
            print(f"warning: tokens are no longer cached: {why}", file=sys.stderr, flush=True)

    def _encode_chunk(self, texts: Sequence[str]) -> Block:
        self._check()
        docs = self._encode(texts)
        tokens = np.concatenate([np.empty(0, self._token_type), *docs], dtype=self._token_type, casting="unsafe")
        return Block(tokens, np.array([len(doc) for doc in docs], np.uint32))


def _chunks(texts: Sequence[str]) -> list[Sequence[str]]:
    """Cut into parts of about CHUNK_CHARS characters; no texts are one part."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64) // CHUNK_CHARS
    edges = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(texts)]
    return [texts[start:stop] for start, stop in itertools.pairwise(edges)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
