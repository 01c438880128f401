"""The pretraining loader: blocks of text → tokens (cached on disk) → packed rows → batches, prefetched in a thread.

Order: every epoch permutes the shards, each shard's blocks and each block's documents, by seed and epoch alone. All
ranks plan all rows, and each copies the tokens of its own: global row r of a step goes to rank r % world_size.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError, base_dir
from nanochat.data import mixture, packing, sources
from nanochat.data.sources import CorruptShardError, DataConfig, Shard, content_hash, num_blocks, read_block, shards_of
from nanochat.data.tokenizer import Tokenizer
from nanochat.distributed import cpu_cores
from nanochat.text import reason

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
    """What a loader needs to resume bit for bit, with any number of ranks."""

    position: dict[str, Any]  # JSON-able: the place in the stream, totals, and the stream's fingerprint ("made_of")
    tokens: np.ndarray  # uint16 or uint32, (n,): the documents in the buffer one after another, each cropped to a row
    lengths: np.ndarray  # int32, (documents,): their full lengths


Stats = dict[str, float]
Batch = tuple[dict[str, Tensor], LoaderState, Stats]
PackedBatches = Generator[tuple[Tensor, LoaderState, Stats], None, None]


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

    A batch is {"inputs", "targets"}: int64 (rows_per_step / world_size, T); targets are the inputs shifted by one.
    The state is equal on all ranks. Statistics are "epoch" and, since the first batch, "docs", "tokens_packed",
    "tokens_cut" (cropped by packing) and "tokens_cut_fraction" (of all tokens). The validation split is never shuffled
    and, without `state`, starts from its beginning with every call.

    Args:
        rows_per_step: rows of a batch, all ranks together.
        sequence_len: tokens T of a row of inputs; packed rows hold T + 1.
        state: resume after the batch that came with it.
        device: where batches go; to CUDA they are copied from pinned memory, without blocking.
    """
    if rows_per_step < 1 or rows_per_step % world_size:
        raise UserError(f"a batch of {rows_per_step} rows does not divide among {world_size} ranks: change it")
    if sequence_len < 1:
        raise UserError(f"sequence_len={sequence_len}: must be at least 1")
    if split == "val":
        config = dataclasses.replace(config, shuffle=False)
    seed = seed if config.seed is None else config.seed
    parts, mixed, device = sources.parts_of(config), [], torch.device(device)
    states = [None] * len(parts) if state is None else mixture.split(state)
    if len(states) != len(parts):
        raise OtherDataError(f"cannot resume with {len(parts)} sources of data, there were {len(states)}")
    for (share, part), old in zip(parts, states):
        shards = tuple(shards_of(part, split))
        stream = StreamConfig(part, tok, split, shards, seed, sequence_len + 1, rank, world_size, share=share)
        (start, buffer), reader = _restore(stream, old), BlockReader(stream)
        unread = _documents(stream, start.doc, _token_blocks(stream, start, reader))
        documents = itertools.chain([(document.length, document) for document in buffer], unread)
        mixed.append(
            Source(stream, start, buffer, reader, packing.plan(documents, stream.row_tokens, config.buffer_docs))
        )
    return _to_device(prefetch(_packed_batches(mixed, rows_per_step, device), config.prefetch_batches), mixed, device)


def _to_device(packed: PackedBatches, mixed: "list[Source]", device: torch.device) -> Generator[Batch, None, None]:
    # The readers are closed first, as the prefetch thread may be waiting for one.
    with contextlib.closing(packed), contextlib.ExitStack() as stack:
        for source in mixed:
            stack.callback(source.reader.close)
        for tokens, state, stats in packed:
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
    skipped: list[str] = dataclasses.field(default_factory=list)  # corrupt shards, and what is wrong with them
    share: float = 1.0  # of the rows, in a mixture

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
        } | ({"share": self.share} if self.share != 1 else {})

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
    """A block: where it comes in the order of its epoch, and which block of which shard it is."""

    epoch: int
    shard: int
    block: int
    shard_index: int
    block_index: int
    error: CorruptShardError | None = None  # why the shard is unreadable


class Document(NamedTuple):
    tokens: bytes  # its ids, cropped to a row; joining bytes is three times as fast as np.concatenate
    length: int  # tokens of the whole document
    ref: BlockRef
    next_doc: int  # the number of the document after it in its block


class Source(NamedTuple):
    """One of the sources that a loader mixes; most have a single one."""

    stream: StreamConfig
    start: Position
    buffer: list[Document]  # at the start
    reader: "BlockReader"
    rows: Iterator[packing.Row[Document]]


class OtherDataError(UserError):
    """The state is of another stream of rows."""


def _restore(stream: StreamConfig, state: LoaderState | None) -> tuple[Position, list[Document]]:
    if state is None:
        return Position(), []
    position = state["position"]
    if position.get("version") != STATE_VERSION:
        raise UserError(f"the data state has version {position.get('version')}, this program reads {STATE_VERSION}")
    saved = position["made_of"]
    changes = [f"{k} was {saved.get(k)}, is {v}" for k, v in stream.fingerprint.items() if saved.get(k) != v]
    if changes:
        raise OtherDataError(
            f"cannot resume with different data ({'; '.join(changes)}): change it back, or start a new run"
        )
    lengths = np.asarray(state["lengths"]).astype(np.int64)
    tokens = np.array(state["tokens"], stream.token_type)
    kept = np.minimum(lengths, stream.row_tokens)
    if kept.sum() != len(tokens) or (lengths < 1).any():
        raise UserError(f"the data state is corrupt: it holds {len(tokens)} tokens, its documents {kept.sum()}")
    start = Position(*(int(position[name]) for name in Position._fields))
    stream.skipped.extend(position.get("skipped", []))
    ref = BlockRef(start.epoch, start.shard, start.block, -1, -1)
    parts = np.split(tokens, np.cumsum(kept))
    return start, [Document(part.tobytes(), length, ref, start.doc) for part, length in zip(parts, lengths.tolist())]


def _block_refs(stream: StreamConfig, start: Position) -> Iterator[BlockRef | None]:
    """Yield all blocks from `start` on, forever, and None after each epoch."""
    first_shard, first_block = start.shard, start.block
    for epoch in itertools.count(start.epoch):
        for shard, shard_index in list(enumerate(stream.order(len(stream.shards), epoch)))[first_shard:]:
            count = 0
            try:
                count = num_blocks(stream.shards[shard_index])
            except CorruptShardError as error:
                yield BlockRef(epoch, shard, 0, shard_index, 0, error)
            for block, block_index in list(enumerate(stream.order(count, epoch, shard_index)))[first_block:]:
                yield BlockRef(epoch, shard, block, shard_index, block_index)
            first_block = 0
        yield None
        first_shard = 0


# ---------------------------------------------------------------------------------------------------------------
# Tokens: a block is one file in the cache, made when it is missing. The cache folder may be deleted at any time.


class TokenBlock(NamedTuple):
    tokens: np.ndarray  # uint16 or uint32: those of all documents one after another
    lengths: np.ndarray  # uint32: tokens of each document


def write_block(path: Path, block: TokenBlock) -> None:
    """Write a block atomically: a line of JSON padded to 128 bytes, the lengths, the tokens, all little-endian."""
    lengths = block.lengths.astype("<u4").tobytes()
    tokens = block.tokens.astype(block.tokens.dtype.newbyteorder("<")).tobytes()
    header = {
        "format": CACHE_FORMAT,
        "docs": len(block.lengths),
        "tokens": len(block.tokens),
        "token_bytes": block.tokens.itemsize,
        "crc32": zlib.crc32(tokens, zlib.crc32(lengths)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n" + lengths + tokens)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_cached(path: Path) -> TokenBlock | None:
    """Return the block that `write_block` wrote, as read-only arrays; None if the file is missing or corrupt."""
    try:
        data = path.read_bytes()
        header = json.loads(data[:HEADER_BYTES])
        lengths = np.frombuffer(data, "<u4", header["docs"], HEADER_BYTES)
        tokens = np.frombuffer(data, f"<u{header['token_bytes']}", offset=HEADER_BYTES + lengths.nbytes)
        valid = (
            header["format"] == CACHE_FORMAT
            and header["crc32"] == zlib.crc32(memoryview(data)[HEADER_BYTES:])
            and header["docs"] == len(lengths)
            and header["tokens"] == len(tokens) == lengths.sum(dtype=np.int64)
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return TokenBlock(tokens, lengths) if valid else None


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
        self._encode_threads = ThreadPoolExecutor(stream.config.tokenizer_threads or cpu_cores(), "tokenize")

    def request(self, ref: BlockRef) -> Callable[[], TokenBlock]:
        """Start to tokenize a block if that is this rank's job. The result waits for it, and raises what failed."""
        path = self.cache_path(ref)
        if path is None or (self._owner(ref) == self._stream.rank and not path.exists()):
            return self._block_threads.submit(self._tokenize, ref, path).result
        return functools.partial(self._wait, ref, path)

    def close(self) -> None:
        """Stop the threads after the chunks that they are working on; does not wait for them."""
        self._closed.set()
        for pool in (self._block_threads, self._encode_threads):
            pool.shutdown(wait=False, cancel_futures=True)

    def cache_path(self, ref: BlockRef) -> Path | None:
        config, shard = self._stream.config, self._stream.shards[ref.shard_index]
        content = content_hash(shard.path, shard.fingerprint) if config.token_cache else None
        if content is None:
            return None
        key = hashlib.sha256(json.dumps([content, shard.part, config.text_column]).encode()).hexdigest()
        folder = base_dir() / "tokens" / self._stream.tok.fingerprint[:16] / f"{shard.path.name}-{key[:16]}"
        return folder / f"{ref.block_index:06d}.tokens"

    def _owner(self, ref: BlockRef) -> int:
        return self._ranks[(ref.shard + ref.block) % len(self._ranks)]

    def _wait(self, ref: BlockRef, path: Path) -> TokenBlock:
        rank, owner = self._stream.rank, self._owner(ref)
        deadline = time.monotonic() + OTHER_RANK_SECONDS
        # Reading is quick, and quicker here than in a thread that has to acquire the interpreter lock first.
        while not (block := read_cached(path)):
            if owner == rank or time.monotonic() > deadline:
                block = self._tokenize(ref, path)
                # The block is readable, so that rank is late or dead: do not wait for it again.
                self._ranks = [r for r in self._ranks if r != owner or r == rank]
                break
            self._raise_if_closed()
            time.sleep(OTHER_RANK_POLL_SECONDS)
        return block

    def _tokenize(self, ref: BlockRef, path: Path | None) -> TokenBlock:
        self._raise_if_closed()
        texts = read_block(self._stream.shards[ref.shard_index], ref.block_index, self._stream.config.text_column)
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64) // CHUNK_CHARS
        edges = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(texts)]
        chunks = [texts[start:stop] for start, stop in itertools.pairwise(edges)]  # no texts are one chunk
        block = TokenBlock(*map(np.concatenate, zip(*self._encode_threads.map(self._encode_chunk, chunks))))
        if path and not self._cache_failed.locked():
            try:
                write_block(path, block)
            except OSError as error:
                if self._cache_failed.acquire(blocking=False):
                    why = f"{path.parent} cannot be written ({reason(error)})"
                    print(f"warning: tokens are no longer cached: {why}", file=sys.stderr, flush=True)
        return block

    def _encode_chunk(self, texts: Sequence[str]) -> TokenBlock:
        self._raise_if_closed()
        docs, dtype = self._stream.tok.encode_documents(texts), self._stream.token_type
        tokens = np.concatenate([np.empty(0, dtype), *docs], dtype=dtype, casting="unsafe")
        return TokenBlock(tokens, np.array([len(doc) for doc in docs], np.uint32))

    def _raise_if_closed(self) -> None:
        if self._closed.is_set() or not self._main.is_alive():
            raise CancelledError


def _token_blocks(stream: StreamConfig, start: Position, reader: BlockReader) -> Iterator[tuple[BlockRef, TokenBlock]]:
    """Yield the blocks from `start` on, forever; each is requested some blocks ahead of its use."""
    blocks_ahead = min(max(BLOCKS_AHEAD, 2 * stream.world_size), SHARED_BLOCKS_AHEAD)
    pending: deque[tuple[BlockRef | None, Any]] = deque()
    epoch_docs = start.shard + start.block  # not 0: an epoch that is resumed had documents before
    corrupt: dict[int, int] = {}  # shard index: the last epoch in which it was found corrupt
    for ahead in _block_refs(stream, start):
        is_corrupt = ahead and (ahead.error or corrupt.get(ahead.shard_index) == ahead.epoch)
        pending.append((ahead, reader.request(ahead) if ahead and not is_corrupt else None))
        if len(pending) <= blocks_ahead:
            continue
        ref, get_block = pending.popleft()
        if ref is None:
            if not epoch_docs:
                raise UserError(
                    f"data.source={stream.config.source}: no documents to read for split {stream.split}; the last file "
                    "by name is the validation split"
                )
            epoch_docs = 0
            continue
        if corrupt.get(ref.shard_index) == ref.epoch:
            continue
        try:
            if ref.error:
                raise ref.error
            block = get_block()
        except CorruptShardError as error:
            if not stream.config.skip_bad_shards:
                raise
            # Its other blocks are skipped until the next epoch, when it is tried again: what is read must not depend
            # on what this process has seen before.
            if stream.rank == 0 and ref.shard_index not in corrupt:
                print(f"warning: skipping a shard: {error}", file=sys.stderr, flush=True)
            corrupt[ref.shard_index] = ref.epoch
            if (text := f"shard {error}") not in stream.skipped:
                stream.skipped.append(text)
            continue
        epoch_docs += len(block.lengths)
        yield ref, block


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


def _packed_batches(mixed: Sequence[Source], rows_per_step: int, device: torch.device) -> PackedBatches:
    """Yield (int64 (2, this rank's rows, T): inputs and targets; state; statistics) of each step."""
    pin = device.type == "cuda"
    if pin and device.index is not None:
        torch.cuda.set_device(device)  # of this thread, else pinning would allocate memory on the first GPU
    stream = mixed[0].stream
    size, shares = np.dtype(stream.token_type).itemsize, [source.stream.share for source in mixed]
    ends: list[Position] = [source.start for source in mixed]
    buffers: list[Iterable[Document]] = [source.buffer for source in mixed]
    while True:
        step = []
        for r in range(rows_per_step):
            turn = mixture.next_source(shares, [end.rows for end in ends])
            row, end = next(mixed[turn].rows), ends[turn]
            if r % stream.world_size == stream.rank:
                step += [document.tokens[: (b - a) * size] for document, a, b in row.pieces]
            totals = (end.rows + 1, end.docs + len(row.pieces), end.tokens_cut + row.cropped_tokens)
            ends[turn] = Position(*row.latest.ref[:3], row.latest.next_doc, *totals)
            buffers[turn] = row.waiting
        packed = np.frombuffer(b"".join(step), stream.token_type).reshape(-1, stream.row_tokens)
        batch = torch.empty((2, len(packed), stream.row_tokens - 1), dtype=torch.int64, pin_memory=pin)
        batch.numpy()[0] = packed[:, :-1]
        batch.numpy()[1] = packed[:, 1:]
        states = [_state(source.stream, *place) for source, place in zip(mixed, zip(ends, buffers))]
        tokens, cropped = (stream.row_tokens * sum(e.rows for e in ends)), sum(e.tokens_cut for e in ends)
        stats = {"epoch": max(e.epoch for e in ends), "docs": sum(e.docs for e in ends), "tokens_packed": tokens}
        stats |= {"tokens_cut": cropped, "tokens_cut_fraction": cropped / (tokens + cropped)}
        yield batch, mixture.join(states, shares, [source.stream.config.source for source in mixed]), stats


def _state(stream: StreamConfig, end: Position, buffer: Iterable[Document]) -> LoaderState:
    waiting = list(buffer)
    return LoaderState(
        position={"version": STATE_VERSION, **end._asdict(), "made_of": dict(stream.fingerprint)}
        | ({"skipped": list(stream.skipped)} if stream.skipped else {}),
        tokens=np.frombuffer(b"".join([document.tokens for document in waiting]), stream.token_type),
        lengths=np.array([document.length for document in waiting], np.int32),
    )


def prefetch(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield what `items` yields, computed at most `depth` items ahead in a thread of its own.

    The thread starts with the first next(). When this generator is closed or collected, or the main thread ends, it
    finishes the item that it is working on and closes `items`. What `items` raises is raised here, in its turn.
    """
    end: Any = object()
    main = threading.main_thread()

    def next_item() -> T:
        if not main.is_alive():
            raise CancelledError
        return next(items, end)

    thread = ThreadPoolExecutor(1, "prefetch")
    pending = deque(thread.submit(next_item) for _ in range(depth))
    try:
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next_item))
            yield item
    finally:
        if main.is_alive():  # else the interpreter has ended the thread
            for future in pending:
                future.cancel()
            wait([thread.submit(items.close)], timeout=2)  # not forever: garbage may be collected in that very thread
            thread.shutdown(wait=False)
