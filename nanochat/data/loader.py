"""The pretraining loader: blocks of text → tokens (cached on disk) → packed rows → batches, prefetched in a thread.

Order: every epoch permutes the shards, each shard's blocks and each block's documents, by seed and epoch alone. All
ranks plan all rows, and each copies the tokens of its own: global row r of a step goes to rank r % world_size.

State: every batch comes with the loader's state after it, a plain value to keep in a checkpoint. A loader started from
it yields the same batches as the uninterrupted one, bit for bit, with any number of ranks.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import queue
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError, base_dir
from nanochat.data import packing
from nanochat.data.sources import CorruptShardError, DataConfig, Shard, num_blocks, read_block, shards_of
from nanochat.data.tokenizer import RUN_CHARS, Tokenizer

T = TypeVar("T")

STATE_VERSION = 1
CACHE_FORMAT = "nanochat-tokens-1"
HEADER_BYTES = 128  # of a file of the token cache
CONCURRENT_BLOCKS = 2  # when one block ends, the next keeps the tokenizer threads busy
CHUNK_CHARS = 100_000  # tokenized by a thread at a time
BLOCKS_AHEAD = 3
SHARED_BLOCKS_AHEAD = 16  # limit for many ranks; each needs blocks of its own among the next ones
OTHER_RANK_SECONDS = 10.0  # to wait for a block that another rank should tokenize
OTHER_RANK_POLL_SECONDS = 0.01


class LoaderState(TypedDict):
    """What a loader needs to resume bit for bit.

    position: JSON-able; the place in the stream, totals, and a fingerprint of the stream ("made_of").
    tokens: uint16 or uint32, (n,); the documents in the buffer one after another, each cropped to a row.
    lengths: int32, (documents,); their full lengths.
    """

    position: dict[str, Any]
    tokens: np.ndarray
    lengths: np.ndarray


Stats = dict[str, float]
Batch = tuple[dict[str, Tensor], LoaderState, Stats]


def batches(
    config: DataConfig,
    tok: Tokenizer,
    *,
    split: Literal["train", "val"],
    rows_per_step: int,
    sequence_len: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    state: LoaderState | None = None,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Yield (this rank's batch, the state after it, statistics) forever, epoch after epoch.

    The validation split is never shuffled and, without `state`, starts from its beginning with every call.

    Args:
        rows_per_step: rows of a batch, all ranks together.
        sequence_len: tokens T of a row of inputs; packed rows hold T + 1.
        state: resume after the batch that came with it.
        device: where batches go; to CUDA they are copied from pinned memory, without blocking.

    Yields:
        {"inputs", "targets"}: int64 (rows_per_step / world_size, T), the targets being the inputs shifted by one.
        The state, equal on all ranks.
        {"epoch"; and since the first batch "docs", "tokens_packed", "tokens_cut": cropped by packing,
        "tokens_cut_fraction": of all tokens}.

    Raises:
        UserError: a setting does not fit, `state` is of another stream, or there are no documents.
        CorruptShardError: a shard is unreadable (raised when its turn comes), unless config.skip_bad_shards.
    """
    if rows_per_step < 1 or rows_per_step % world_size:
        raise UserError(f"a batch of {rows_per_step} rows does not divide among {world_size} ranks: change it")
    for name, value in {
        "sequence_len": sequence_len,
        "data.buffer_docs": config.buffer_docs,
        "data.prefetch_batches": config.prefetch_batches,
        "data.tokenizer_threads": config.tokenizer_threads,
    }.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be 1 or more")
    if split == "val":
        config = dataclasses.replace(config, shuffle=False)
    stream = StreamConfig(config, tok, split, tuple(shards_of(config, split)), seed, sequence_len + 1, rank, world_size)
    start, buffer = _restore(stream, state)
    return _prefetched(stream, start, buffer, rows_per_step, torch.device(device))


def _prefetched(
    stream: "StreamConfig", start: "Position", buffer: "list[Document]", rows_per_step: int, device: torch.device
) -> Generator[Batch, None, None]:
    reader = BlockReader(stream)
    packed = _packed_batches(stream, start, buffer, reader, rows_per_step, device)
    # The reader is closed first, as the prefetch thread may be waiting for it.
    with contextlib.closing(prefetch(packed, stream.config.prefetch_batches)) as ready, contextlib.closing(reader):
        for tokens, state, stats in ready:
            tokens = tokens.to(device, non_blocking=True)  # here and not in the thread: on the consumer's CUDA stream
            yield {"inputs": tokens[0], "targets": tokens[1]}, state, stats


# ---------------------------------------------------------------------------------------------------------------
# The stream, and where a loader starts in it


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    config: DataConfig
    tok: Tokenizer
    split: str
    shards: tuple[Shard, ...]
    seed: int
    row_tokens: int
    rank: int
    world_size: int

    @property
    def token_type(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.tok.vocab_size <= 2**16 else np.uint32

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the rows; independent of paths and times of change, so that data may be moved."""
        files = [(shard.path.name, shard.part, shard.path.stat().st_size) for shard in self.shards]
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return {
            "split": self.split,
            "seed": self.seed,
            "sequence_len": self.row_tokens - 1,
            "data.buffer_docs": self.config.buffer_docs,
            "data.shuffle": self.config.shuffle,
            "data.text_column": self.config.text_column,
            "tokenizer": self.tok.fingerprint[:16],
            "data": f"{len(files)} shards {digest[:16]}",
        }

    def order(self, count: int, *key: int) -> Sequence[int]:
        """Return a permutation of range(count). Raw Philox output, unlike numpy's shuffles, never changes."""
        if not self.config.shuffle:
            return range(count)
        digest = hashlib.sha256(json.dumps([self.seed, *key]).encode()).digest()
        random = np.random.Philox(np.random.SeedSequence(int.from_bytes(digest, "little")))
        return np.argsort(random.random_raw(count), kind="stable").tolist()


class Position(NamedTuple):
    """The next document to read, each number counted in the order of its epoch, and totals since the first batch."""

    epoch: int = 0
    shard: int = 0
    block: int = 0
    doc: int = 0
    rows: int = 0
    docs: int = 0
    tokens_cut: int = 0


class BlockRef(NamedTuple):
    """A block: where it comes in the order of its epoch, and which block of which shard it is.

    An epoch ends with a reference behind its last shard. error: why the shard is unreadable.
    """

    epoch: int
    shard: int
    block: int
    shard_index: int
    block_index: int
    error: CorruptShardError | None = None


class Document(NamedTuple):
    """A tokenized document.

    Attributes:
        tokens: its ids as raw bytes, cropped to a row; joining bytes is three times as fast as np.concatenate.
        length: tokens of the whole document.
        ref, next_doc: its block, and the number of the document after it.
    """

    tokens: bytes
    length: int
    ref: BlockRef
    next_doc: int


def _restore(stream: StreamConfig, state: LoaderState | None) -> tuple[Position, list[Document]]:
    """Return a saved state's position and buffer, or raise a UserError that names what does not match."""
    if state is None:
        return Position(), []
    position = state["position"]
    if position.get("version") != STATE_VERSION:
        raise UserError(f"the data state has version {position.get('version')}, this program reads {STATE_VERSION}")
    saved, current = position["made_of"], stream.fingerprint
    changes = [
        f"{name} was {saved.get(name)}, is {value}" for name, value in current.items() if saved.get(name) != value
    ]
    if changes:
        raise UserError(f"cannot resume with different data ({'; '.join(changes)}): change it back, or start a new run")
    lengths = np.asarray(state["lengths"]).astype(np.int64)
    tokens = np.array(state["tokens"], stream.token_type)
    kept = np.minimum(lengths, stream.row_tokens)
    if kept.sum() != len(tokens) or (lengths < 1).any():
        raise UserError(f"the data state is corrupt: it holds {len(tokens)} tokens, its documents {kept.sum()}")
    start = Position(*(int(position[name]) for name in Position._fields))
    ref = BlockRef(start.epoch, start.shard, start.block, -1, -1)
    parts = np.split(tokens, np.cumsum(kept))
    return start, [Document(part.tobytes(), length, ref, start.doc) for part, length in zip(parts, lengths.tolist())]


def _state(stream: StreamConfig, position: Position, buffer: Iterable[Document]) -> LoaderState:
    documents = list(buffer)
    return LoaderState(
        position={"version": STATE_VERSION, **position._asdict(), "made_of": dict(stream.fingerprint)},
        tokens=np.frombuffer(b"".join([document.tokens for document in documents]), stream.token_type),
        lengths=np.array([document.length for document in documents], np.int32),
    )


# ---------------------------------------------------------------------------------------------------------------
# Blocks of text, in order


def _block_refs(stream: StreamConfig, start: Position) -> Iterator[BlockRef]:
    """Yield all blocks from `start` on, forever."""
    shards, first_shard, first_block = stream.shards, start.shard, start.block
    for epoch in itertools.count(start.epoch):
        for shard, shard_index in list(enumerate(stream.order(len(shards), epoch)))[first_shard:]:
            try:
                count = num_blocks(shards[shard_index])
            except CorruptShardError as error:
                yield BlockRef(epoch, shard, 0, shard_index, 0, error)
                count = 0
            for block, block_index in list(enumerate(stream.order(count, epoch, shard_index)))[first_block:]:
                yield BlockRef(epoch, shard, block, shard_index, block_index)
            first_block = 0
        yield BlockRef(epoch, len(shards), 0, 0, 0)
        first_shard = 0


# ---------------------------------------------------------------------------------------------------------------
# Tokens: a block is one file in the cache, made when it is missing. The cache folder may be deleted at any time.


class TokenBlock(NamedTuple):
    """Tokenized documents.

    Attributes:
        tokens: the documents' tokens one after another, uint16 or uint32, (sum of lengths,).
        lengths: tokens of each document, uint32, (documents,).
    """

    tokens: np.ndarray
    lengths: np.ndarray


def write_block(path: Path, block: TokenBlock) -> None:
    """Write a block atomically: a line of JSON padded to 128 bytes, the lengths, the tokens, all little-endian.

    Raises:
        OSError: the file cannot be written.
    """
    size = block.tokens.itemsize
    data = block.lengths.astype("<u4").tobytes() + block.tokens.astype(f"<u{size}").tobytes()
    header = {
        "format": CACHE_FORMAT,
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


def read_cached(path: Path) -> TokenBlock | None:
    """Return the block that `write_block` wrote, as read-only arrays; None if the file is missing or corrupt."""
    try:
        data = path.read_bytes()
        header = json.loads(data[:HEADER_BYTES])
        docs, size, token_bytes = header["docs"], header["tokens"], header["token_bytes"]
        valid = (
            header["format"] == CACHE_FORMAT
            and token_bytes in (2, 4)
            and len(data) == HEADER_BYTES + 4 * docs + token_bytes * size
            and header["crc32"] == zlib.crc32(memoryview(data)[HEADER_BYTES:])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not valid:
        return None
    lengths = np.frombuffer(data, "<u4", docs, HEADER_BYTES)
    tokens = np.frombuffer(data, f"<u{token_bytes}", size, HEADER_BYTES + 4 * docs)
    return TokenBlock(tokens, lengths) if int(lengths.sum(dtype=np.int64)) == size else None


class BlockReader:
    """Reads the blocks of a stream from the token cache, or tokenizes them, in its own threads.

    Ranks share the work: each tokenizes its share of the blocks that are not cached and reads the others' when they
    appear. It waits a bounded time for them and then tokenizes itself, so that no failure of another rank blocks it.
    """

    def __init__(self, stream: StreamConfig):
        self._stream = stream
        self._ranks = list(range(stream.world_size))  # those that tokenize their share
        self._cache_failed = threading.Lock()  # acquired once
        self._closed, self._main = threading.Event(), threading.main_thread()
        self._block_threads = ThreadPoolExecutor(CONCURRENT_BLOCKS, "read-block")
        self._encode_threads = ThreadPoolExecutor(stream.config.tokenizer_threads or _cores(), "tokenize")

    def start(self, ref: BlockRef) -> Future[TokenBlock] | None:
        """Start to tokenize a block if that is this rank's job. Pass the result to `result`."""
        path = self._path(ref)
        if path is None or (self._owner(ref) == self._stream.rank and not path.exists()):
            return self._block_threads.submit(self._tokenize, ref, path)
        return None

    def result(self, ref: BlockRef, started: Future[TokenBlock] | None) -> TokenBlock:
        """Wait for a block and return it; raises what reading its text raises."""
        path = self._path(ref)
        if started or path is None:
            return started.result() if started else self._tokenize(ref, None)
        owner = self._owner(ref)
        deadline = time.monotonic() + OTHER_RANK_SECONDS
        # Reading is quick, and quicker here than in a thread that has to acquire the interpreter lock first.
        while not (block := read_cached(path)):
            if owner == self._stream.rank or time.monotonic() > deadline:
                block = self._tokenize(ref, path)
                # The block is readable, so that rank is late or dead: do not wait for it again.
                self._ranks = [rank for rank in self._ranks if rank != owner or rank == self._stream.rank]
                break
            self._raise_if_closed()
            time.sleep(OTHER_RANK_POLL_SECONDS)
        return block

    def close(self) -> None:
        """Stop the threads after the chunks that they are working on; does not wait for them."""
        self._closed.set()
        for pool in (self._block_threads, self._encode_threads):
            pool.shutdown(wait=False, cancel_futures=True)

    def _owner(self, ref: BlockRef) -> int:
        return self._ranks[(ref.shard + ref.block) % len(self._ranks)]

    def _path(self, ref: BlockRef) -> Path | None:
        config, shard = self._stream.config, self._stream.shards[ref.shard_index]
        if not config.token_cache:
            return None
        key = json.dumps([str(shard.path.absolute()), shard.fingerprint, config.text_column])
        folder = f"{shard.path.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return base_dir() / "tokens" / self._stream.tok.fingerprint[:16] / folder / f"{ref.block_index:06d}.tokens"

    def _raise_if_closed(self) -> None:
        if self._closed.is_set() or not self._main.is_alive():
            raise CancelledError

    def _tokenize(self, ref: BlockRef, path: Path | None) -> TokenBlock:
        self._raise_if_closed()
        texts = read_block(self._stream.shards[ref.shard_index], ref.block_index, self._stream.config.text_column)
        block = TokenBlock(*map(np.concatenate, zip(*self._encode_threads.map(self._encode_chunk, _chunks(texts)))))
        if path and not self._cache_failed.locked():
            try:
                write_block(path, block)
            except OSError as error:
                if self._cache_failed.acquire(blocking=False):
                    why = f"{path.parent} cannot be written ({error.strerror})"
                    print(f"warning: tokens are no longer cached: {why}", file=sys.stderr, flush=True)
        return block

    def _encode_chunk(self, texts: Sequence[str]) -> TokenBlock:
        self._raise_if_closed()
        docs, dtype = _encode(self._stream.tok, texts), self._stream.token_type
        tokens = np.concatenate([np.empty(0, dtype), *docs], dtype=dtype, casting="unsafe")
        return TokenBlock(tokens, np.array([len(doc) for doc in docs], np.uint32))


def _chunks(texts: Sequence[str]) -> list[Sequence[str]]:
    """Split into chunks of about CHUNK_CHARS characters; no texts are one chunk."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64) // CHUNK_CHARS
    edges = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(texts)]
    return [texts[start:stop] for start, stop in itertools.pairwise(edges)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode(tok: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the tokens of each text that is not empty, after <|bos|>.

    Most texts go to tiktoken as one, joined by <|bos|>: it encodes the text between special tokens separately, and
    releases the interpreter lock while it works, so longer is better.
    """

    def encode_one(text: str) -> np.ndarray:
        return np.array([tok.bos, *tok.encode(text)], np.uint32)

    def has_no_long_run(text: str) -> bool:  # of spaces or anything else, which `tok.encode` would split
        chunks = (text[end - RUN_CHARS : end] for end in range(RUN_CHARS, len(text) + 1, RUN_CHARS))
        return all(" " in chunk and not chunk.isspace() for chunk in chunks)

    bos = "<|bos|>"
    texts = [text for text in texts if text]
    plain = [bos not in text and has_no_long_run(text) for text in texts]
    joined = "".join(bos + text for text, is_plain in zip(texts, plain) if is_plain)
    try:
        ids = tok.encoding.encode_to_numpy(joined, allowed_special={bos}, disallowed_special=())
    except UnicodeEncodeError:  # half a surrogate pair somewhere, which `tok.encode` replaces
        return [encode_one(text) for text in texts]
    docs = iter(np.split(ids, np.flatnonzero(ids == tok.bos)[1:]))
    return [next(docs) if is_plain else encode_one(text) for text, is_plain in zip(texts, plain)]


def _token_blocks(stream: StreamConfig, start: Position, reader: BlockReader) -> Iterator[tuple[BlockRef, TokenBlock]]:
    """Yield the blocks from `start` on, forever; each is started some blocks ahead of its use."""
    blocks_ahead = min(max(BLOCKS_AHEAD, 2 * stream.world_size), SHARED_BLOCKS_AHEAD)
    refs = _block_refs(stream, start)
    pending: deque[tuple[BlockRef, Future[TokenBlock] | None]] = deque()
    docs, is_full_epoch = 0, start.shard == start.block == 0
    corrupt: dict[int, int] = {}  # shard index: the last epoch in which it was found corrupt
    while True:
        while len(pending) <= blocks_ahead:
            ref = next(refs)
            is_readable = ref.shard < len(stream.shards) and not ref.error and corrupt.get(ref.shard_index) != ref.epoch
            pending.append((ref, reader.start(ref) if is_readable else None))
        ref, started = pending.popleft()
        if ref.shard == len(stream.shards):
            if is_full_epoch and not docs:
                raise UserError(f"data.source={stream.config.source}: no documents to read for split {stream.split}")
            docs, is_full_epoch = 0, True
            continue
        if corrupt.get(ref.shard_index) == ref.epoch:
            continue
        try:
            if ref.error:
                raise ref.error
            block = reader.result(ref, started)
        except CorruptShardError as error:
            if not stream.config.skip_bad_shards:
                raise
            # Its other blocks are skipped until the next epoch, when it is tried again: what is read must not depend
            # on what this process has seen before.
            if stream.rank == 0 and ref.shard_index not in corrupt:
                print(f"warning: skipping a shard: {error}", file=sys.stderr, flush=True)
            corrupt[ref.shard_index] = ref.epoch
            continue
        docs += len(block.lengths)
        yield ref, block


# ---------------------------------------------------------------------------------------------------------------
# Documents, packed rows, batches


def _documents(
    stream: StreamConfig, skip: int, blocks: Iterable[tuple[BlockRef, TokenBlock]]
) -> Iterator[tuple[int, Document]]:
    """Yield (length, document) of the blocks in the order of their epochs, but for the first `skip`."""
    for ref, block in blocks:
        count, size = len(block.lengths), block.tokens.itemsize
        if skip > count:
            path = stream.shards[ref.shard_index].path
            raise UserError(f"{path} has changed: of its block {ref.block_index}, {skip} documents were read before")
        ends = np.cumsum(block.lengths, dtype=np.int64)
        starts = ends - block.lengths
        stops = np.minimum(ends, starts + stream.row_tokens)
        spans = list(zip((starts * size).tolist(), (stops * size).tolist(), block.lengths.tolist()))
        order = stream.order(count, ref.epoch, ref.shard_index, ref.block_index)
        tokens = block.tokens.tobytes()
        for doc in range(skip, count):
            first, last, length = spans[order[doc]]
            # Slices of bytes are copies, so that a waiting document does not keep its block in memory.
            yield length, Document(tokens[first:last], length, ref, doc + 1)
        skip = 0


def _packed_batches(
    stream: StreamConfig,
    start: Position,
    buffer: list[Document],
    reader: BlockReader,
    rows_per_step: int,
    device: torch.device,
) -> Generator[tuple[Tensor, LoaderState, Stats], None, None]:
    """Yield (int64 (2, this rank's rows, T): inputs and targets; state; statistics) of each step."""
    pin = device.type == "cuda"
    if pin and device.index is not None:
        torch.cuda.set_device(device)  # of this thread, else pinning would allocate memory on the first GPU
    size = np.dtype(stream.token_type).itemsize
    fresh = _documents(stream, start.doc, _token_blocks(stream, start, reader))
    documents = itertools.chain([(document.length, document) for document in buffer], fresh)
    rows = packing.plan(documents, stream.row_tokens, stream.config.buffer_docs)
    num_rows, docs, cropped = start.rows, start.docs, start.tokens_cut
    while True:
        step = []
        for r in range(rows_per_step):
            row = next(rows)
            if r % stream.world_size == stream.rank:
                step += [document.tokens[: (b - a) * size] for document, a, b in row.pieces]
            docs += len(row.pieces)
            cropped += row.cropped_tokens
        num_rows += rows_per_step
        packed = np.frombuffer(b"".join(step), stream.token_type).reshape(-1, stream.row_tokens)
        batch = torch.empty((2, len(packed), stream.row_tokens - 1), dtype=torch.int64, pin_memory=pin)
        batch.numpy()[0] = packed[:, :-1]
        batch.numpy()[1] = packed[:, 1:]
        epoch, shard, block, *_ = row.latest.ref
        position = Position(epoch, shard, block, row.latest.next_doc, num_rows, docs, cropped)
        tokens = num_rows * stream.row_tokens
        stats = {"epoch": epoch, "docs": docs, "tokens_packed": tokens, "tokens_cut": cropped}
        yield (
            batch,
            _state(stream, position, row.waiting),
            stats | {"tokens_cut_fraction": cropped / (tokens + cropped)},
        )


# ---------------------------------------------------------------------------------------------------------------
# Prefetching


def prefetch(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield what `items` yields, computed at most `depth` items ahead in a thread of its own.

    The thread starts with the first next(). When this generator is closed or collected, or the main thread ends, it
    finishes the item that it is working on and closes `items`. What `items` raises is raised here, in its turn.
    """
    stop = threading.Event()
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    main, current_thread = threading.main_thread(), threading.current_thread

    def put(item: tuple[T] | BaseException | None) -> bool:
        while not stop.is_set() and main.is_alive():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            with contextlib.closing(items):
                if all(put((item,)) for item in items):
                    put(None)
        except BaseException as error:
            put(error)

    # Not a daemon, which the end of the interpreter could kill inside of native code.
    thread = threading.Thread(target=work, name="prefetch", daemon=False)
    thread.start()
    try:
        while True:
            match ready.get():
                case (item,):
                    yield item
                case None:
                    return
                case error:
                    raise error
    finally:
        # No global names from here on: modules may be gone when an open generator is collected at exit.
        stop.set()
        while ready.qsize():  # make room for a put() that waits
            ready.get_nowait()
        if thread is not current_thread():  # garbage is collected in any thread
            thread.join(timeout=5)
