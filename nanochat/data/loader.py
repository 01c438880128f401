"""Batches of packed rows: shards → blocks → documents → tokens → best fit; the same rows for any number of ranks.

Order: every epoch permutes the shards, each shard's blocks and each block's documents, by the seed and the epoch and
nothing else. All ranks plan all rows, from lengths alone; each copies the tokens of its own rows only. Global row r of
a step goes to rank r % world_size, as its row r // world_size.

State: every batch comes with the loader's state after it, a plain value to keep in a checkpoint: the place in the
stream and the documents in the packing buffer. A loader made from it goes on bit for bit, with any number of ranks.

Threads: one packs `prefetch_batches` ahead, a few more read and tokenise blocks for it. Closing the generator, or
letting go of it, stops them all; so does the end of the main thread.

A generator's items made ahead of their use, in a thread that never outlives its purpose.

Blocks of tokenised documents: kept on disk, made when they are not there, shared between ranks, read ahead.

One block is one file: a line of JSON padded to 128 bytes, then the documents' lengths (uint32), then their tokens one
after another (uint16 or uint32), all little-endian. It is written in one piece and checked whole when read; a file
that is missing, cut short or damaged is made again. The folder may be deleted at any time.
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
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class PrefetchStopped(Exception):
    """Nobody wants the work any more."""


def prefetch(make: Callable[[Callable[[], None]], Iterator[T]], depth: int) -> Generator[T, None, None]:
    """Yield the items of an iterator that runs in its own thread, at most `depth` of them ahead.

    The thread starts with the first next(). It ends when the generator is closed or collected, and when the main
    thread ends.

    Args:
        make: called in the thread with a function `check`, returns the iterator. `check`, which long work should call
            now and then, raises `Stopped` once the thread should end. Whatever else the iterator raises is raised
            here, after the items made before.
        depth: items ready and waiting, 1 or more.
    """
    stop = threading.Event()
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    main = threading.main_thread()

    def stopped() -> bool:
        return stop.is_set() or not main.is_alive()

    def check() -> None:
        if stopped():
            raise PrefetchStopped

    def put(item: tuple[T] | BaseException | None) -> None:
        while not stopped():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for item in make(check):
                put((item,))
                check()
            put(None)
        except BaseException as error:
            put(error)

    # A daemon would be torn out of native code when the interpreter ends; this one sees that end coming and leaves.
    thread = threading.Thread(target=work, name="run-ahead", daemon=False)
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
        stop.set()
        with contextlib.suppress(queue.Empty):  # make room for a put() that waits
            while True:
                ready.get_nowait()
        if thread is not threading.current_thread():  # garbage is collected in any thread
            thread.join(timeout=5)


CACHE_FORMAT = "nanochat-tokens-1"
HEADER_BYTES = 128
BLOCKS_AT_ONCE = 2  # as one block ends, the next keeps the tokenising threads busy
CHUNK_CHARS = 100_000  # that a thread tokenises in one go
OTHERS_WAIT_SECONDS = 10.0  # for a block that another rank should tokenise
OTHERS_POLL_SECONDS = 0.01


class TokenBlock(NamedTuple):
    """Tokenised documents.

    Attributes:
        tokens: the documents' tokens one after another, uint16 or uint32, (sum of lengths,).
        lengths: tokens of each document, uint32, (documents,).
    """

    tokens: np.ndarray
    lengths: np.ndarray


def write_block(path: Path, block: TokenBlock) -> None:
    """Write `block` so that `path` is complete if it exists, whoever else writes it; OSError if that fails."""
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
    """Return what `write` put there, as read-only arrays, or None if the file is missing or not exactly that."""
    try:
        data = path.read_bytes()
        header = json.loads(data[:HEADER_BYTES])
        docs, size, token_bytes = header["docs"], header["tokens"], header["token_bytes"]
        sound = (
            header["format"] == CACHE_FORMAT
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
    return TokenBlock(tokens, lengths) if int(lengths.sum(dtype=np.int64)) == size else None


class BlockRequest(NamedTuple):
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

    def start(self, request: BlockRequest) -> Future[TokenBlock] | None:
        """Begin with a block if this rank has to tokenise it. Give what is returned to `result`."""
        if request.path is None or (self._whose(request) == self._rank and not os.path.exists(request.path)):
            return self._block_threads.submit(self._tokenize, request)
        return None

    def result(self, request: BlockRequest, started: Future[TokenBlock] | None) -> TokenBlock:
        """Return the block, waiting for it; raises what `request.texts` raises."""
        if started:
            return started.result()
        assert request.path, "start() has started it"
        whose = self._whose(request)
        deadline = time.monotonic() + OTHERS_WAIT_SECONDS
        # Reading is quick, and quicker here than in a thread that has to get hold of the interpreter first.
        while not (block := read_cached(request.path)):
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

    def _whose(self, request: BlockRequest) -> int:
        return self._sharers[request.turn % len(self._sharers)]

    def _tokenize(self, request: BlockRequest) -> TokenBlock:
        self._check()
        texts = request.texts()
        blocks = self._encode_threads.map(self._encode_chunk, _text_chunks(texts))
        block = TokenBlock(*map(np.concatenate, zip(*blocks)))
        if request.path and self._writing:
            try:
                write_block(request.path, block)
            except OSError as error:
                self._give_up_writing(request.path.parent, error)
        return block

    def _give_up_writing(self, folder: Path, error: OSError) -> None:
        with self._lock:
            told, self._writing = not self._writing, False
        if not told:
            why = f"{folder} cannot be written ({error.strerror})"
            print(f"warning: tokens are no longer cached: {why}", file=sys.stderr, flush=True)

    def _encode_chunk(self, texts: Sequence[str]) -> TokenBlock:
        self._check()
        docs = self._encode(texts)
        tokens = np.concatenate([np.empty(0, self._token_type), *docs], dtype=self._token_type, casting="unsafe")
        return TokenBlock(tokens, np.array([len(doc) for doc in docs], np.uint32))


def _text_chunks(texts: Sequence[str]) -> list[Sequence[str]]:
    """Cut into parts of about CHUNK_CHARS characters; no texts are one part."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64) // CHUNK_CHARS
    edges = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(texts)]
    return [texts[start:stop] for start, stop in itertools.pairwise(edges)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


STATE_VERSION = 1
BLOCKS_AHEAD = 3
SHARED_BLOCKS_AHEAD = 16  # at most; with several ranks, each has to see blocks of its own among the next ones


class LoaderState(TypedDict):
    """All that a loader needs to go on bit for bit.

    position: JSON-able; the place in the stream, totals, and what the stream is made of.
    tokens: uint16 or uint32, (n,); the documents in the buffer one after another, no more than a row of each.
    lengths: int32, (documents,); their whole lengths.
    """

    position: dict[str, Any]
    tokens: np.ndarray
    lengths: np.ndarray


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
) -> Generator[tuple[dict[str, Tensor], LoaderState, dict[str, float]], None, None]:
    """Yield (this rank's batch, the state after it, statistics) without end: epoch follows epoch.

    The validation split is never shuffled and, without `state`, starts at its beginning with every call.

    Args:
        config: source, order, buffer, cache and threads.
        tok: encodes the documents; its <|bos|> starts each of them.
        split: train or val.
        rows_per_step: rows of a batch, all ranks together.
        sequence_len: tokens T of a row of inputs; packed rows hold T + 1.
        seed: orders the training documents.
        rank, world_size: which process of how many this is.
        state: goes on after the batch that came with it.
        device: where batches go; to CUDA they are copied from pinned memory, without blocking.

    Yields:
        {"inputs", "targets"}: int64 (rows_per_step / world_size, T) each, targets being the inputs moved on by one.
        The state, equal on all ranks. {"epoch": the one being read; since the first batch "docs", "tokens_packed",
        "tokens_cut": tokens lost by cutting, "tokens_cut_fraction": of all tokens}.

    Raises:
        UserError: a setting does not fit, `state` is of another stream, or there are no documents.
        BadShardError: a shard cannot be read (raised by next(), in its turn), unless config.skip_bad_shards.
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
    stream = _Stream(config, tok, split, tuple(shards_of(config, split)), seed, sequence_len + 1, rank, world_size)
    place, held = _restore(stream, state) if state else (_Place(), [])
    device = torch.device(device)
    steps = functools.partial(_steps, stream, place, held, rows_per_step, device)
    return _delivered(prefetch(steps, config.prefetch_batches), device)


def _delivered(
    steps: Generator[tuple[Tensor, LoaderState, dict[str, float]], None, None], device: torch.device
) -> Generator[tuple[dict[str, Tensor], LoaderState, dict[str, float]], None, None]:
    """Move the batches to the device from the consumer's thread: on its stream, in its order."""
    with contextlib.closing(steps):
        for tokens, state, stats in steps:
            tokens = tokens.to(device, non_blocking=True)
            yield {"inputs": tokens[0], "targets": tokens[1]}, state, stats


# ---------------------------------------------------------------------------------------------------------------
# What a stream is, and where in it a loader stands


@dataclasses.dataclass(frozen=True)
class _Stream:
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
    def identity(self) -> dict[str, Any]:
        """Everything that decides the rows. Folders and times of change do not, so that data may move house."""
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
        """Return the order of `count` things. Raw Philox output, unlike numpy's shuffles, is fixed for good."""
        if not self.config.shuffle:
            return range(count)
        digest = hashlib.sha256(json.dumps([self.seed, *key]).encode()).digest()
        random = np.random.Philox(np.random.SeedSequence(int.from_bytes(digest, "little")))
        return np.argsort(random.random_raw(count), kind="stable").tolist()

    def cache_folder(self, shard: Shard) -> Path:
        key = json.dumps([str(shard.path.absolute()), shard.fingerprint, self.config.text_column])
        name = f"{shard.path.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return base_dir() / "tokens" / self.tok.fingerprint[:16] / name


@dataclasses.dataclass
class _Place:
    """Which document is loaded next (each count in its epoch's order), and totals."""

    epoch: int = 0
    shard: int = 0
    block: int = 0
    doc: int = 0
    rows: int = 0
    docs: int = 0
    tokens_cut: int = 0


_Held = tuple[np.ndarray, int]  # a document in the buffer: its first tokens, as many as a row can use, and its length


def _snapshot(stream: _Stream, place: _Place, held: dict[int, _Held]) -> LoaderState:
    tokens, lengths = zip(*held.values()) if held else ((), ())
    return LoaderState(
        position={"version": STATE_VERSION, **vars(place), "made_of": dict(stream.identity)},
        tokens=np.frombuffer(b"".join(tokens), stream.token_type),  # three times as fast as np.concatenate
        lengths=np.array(lengths, np.int32),
    )


def _restore(stream: _Stream, state: LoaderState) -> tuple[_Place, list[_Held]]:
    """Return place and buffer of a saved state, or raise a UserError that names what does not match."""
    position = state["position"]
    if position.get("version") != STATE_VERSION:
        raise UserError(f"the data state has version {position.get('version')}, this program reads {STATE_VERSION}")
    was, now = position["made_of"], stream.identity
    changes = [f"{name} was {was.get(name)}, is {value}" for name, value in now.items() if was.get(name) != value]
    if changes:
        raise UserError(f"cannot go on with other data ({'; '.join(changes)}): set it back, or start a new run")
    lengths = np.asarray(state["lengths"]).astype(np.int64)
    tokens = np.array(state["tokens"], stream.token_type)
    kept = np.minimum(lengths, stream.row_tokens)
    if kept.sum() != len(tokens) or (lengths < 1).any():
        raise UserError(f"the data state is damaged: it holds {len(tokens)} tokens, its documents {kept.sum()}")
    place = _Place(**{field.name: int(position[field.name]) for field in dataclasses.fields(_Place)})
    parts = np.split(tokens, np.cumsum(kept))
    return place, list(zip(parts, lengths.tolist()))


# ---------------------------------------------------------------------------------------------------------------
# Packing


def _steps(
    stream: _Stream,
    place: _Place,
    restored: list[_Held],
    rows_per_step: int,
    device: torch.device,
    check: Callable[[], None],
) -> Iterator[tuple[Tensor, LoaderState, dict[str, float]]]:
    """Yield (int64 (2, this rank's rows, T): inputs and targets; state; statistics) of each step."""
    rank, world_size, row_tokens = stream.rank, stream.world_size, stream.row_tokens
    held: dict[int, _Held] = {}  # by number of arrival, in that order
    pin = device.type == "cuda"
    if pin and device.index is not None:
        torch.cuda.set_device(device)  # of this thread, or pinning would take up memory on the first GPU
    with contextlib.closing(_reader(stream, check)) as reader:
        arrivals = _arrivals(stream, place, restored, held, _blocks(stream, place, reader))
        rows = packing.plan(arrivals, row_tokens, stream.config.buffer_docs)
        while True:
            packed = np.empty((rows_per_step // world_size, row_tokens), stream.token_type)
            for r, (pieces, lost) in enumerate(itertools.islice(rows, rows_per_step)):
                mine, row = r % world_size == rank, packed[r // world_size]
                for number, start, stop in pieces:
                    tokens, _ = held.pop(number)
                    if mine:
                        row[start:stop] = tokens[: stop - start]
                place.docs += len(pieces)
                place.tokens_cut += lost
            place.rows += rows_per_step
            batch = torch.empty((2, len(packed), row_tokens - 1), dtype=torch.int64, pin_memory=pin)
            batch.numpy()[0] = packed[:, :-1]
            batch.numpy()[1] = packed[:, 1:]
            packed_tokens = place.rows * row_tokens
            stats: dict[str, float] = {
                "epoch": place.epoch,
                "docs": place.docs,
                "tokens_packed": packed_tokens,
                "tokens_cut": place.tokens_cut,
                "tokens_cut_fraction": place.tokens_cut / (packed_tokens + place.tokens_cut),
            }
            yield batch, _snapshot(stream, place, held), stats


def _arrivals(
    stream: _Stream,
    place: _Place,
    restored: list[_Held],
    held: dict[int, _Held],
    blocks: Iterator[tuple["_Turn", TokenBlock]],
) -> Iterator[int]:
    """Put document after document into `held`, move `place` on behind it, and yield its length."""
    number = last_block = 0
    for document in restored:
        held[number] = document
        number += 1
        yield document[1]
    skip = place.doc
    for turn, block in blocks:
        for waiting in range(last_block, number):
            if waiting in held:  # copied, it does not keep all of its block in memory
                held[waiting] = (held[waiting][0].copy(), held[waiting][1])
        last_block = number
        if skip > len(block.lengths):
            name = stream.shards[turn.shard_index].path
            raise UserError(f"{name} has changed: of its block {turn.block_index}, {skip} documents were read before")
        ends = np.cumsum(block.lengths, dtype=np.int64)
        starts = ends - block.lengths
        stops = np.minimum(ends, starts + stream.row_tokens)
        spans = list(zip(starts.tolist(), stops.tolist(), block.lengths.tolist()))
        order = stream.order(len(spans), turn.epoch, turn.shard_index, turn.block_index)
        place.epoch, place.shard, place.block, place.doc = turn.epoch, turn.shard, turn.block, skip
        for index in order[skip:]:
            start, stop, length = spans[index]
            held[number] = (block.tokens[start:stop], length)
            number += 1
            place.doc += 1
            yield length
        skip = 0


# ---------------------------------------------------------------------------------------------------------------
# Reading


class _Turn(NamedTuple):
    """A block's place in the order of its epoch, and which block of which shard it is.

    An epoch ends with a turn behind its last shard. error: why the shard cannot be read.
    """

    epoch: int
    shard: int
    block: int
    shard_index: int
    block_index: int
    error: CorruptShardError | None = None


def _reader(stream: _Stream, check: Callable[[], None]) -> BlockReader:
    return BlockReader(
        functools.partial(_encode, stream.tok),
        stream.token_type,
        check=check,
        threads=stream.config.tokenizer_threads,
        rank=stream.rank,
        world_size=stream.world_size,
    )


def _encode(tok: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the tokens of each text, <|bos|> before them; texts without any are left out.

    Most texts go to tiktoken as one, with <|bos|> between them: it encodes what lies between special tokens on its own,
    and gives other threads the interpreter for as long as it works, so the longer the better.
    """

    def alone(text: str) -> np.ndarray:
        return np.array([tok.bos, *tok.encode(text)], np.uint32)

    def has_no_long_run(text: str) -> bool:  # of spaces or anything else, which `tok.encode` would take apart
        chunks = (text[end - RUN_CHARS : end] for end in range(RUN_CHARS, len(text) + 1, RUN_CHARS))
        return all(" " in chunk and not chunk.isspace() for chunk in chunks)

    bos = "<|bos|>"
    texts = [text for text in texts if text]
    plain = [bos not in text and has_no_long_run(text) for text in texts]
    joined = "".join(bos + text for text, is_plain in zip(texts, plain) if is_plain)
    try:
        ids = tok.encoding.encode_to_numpy(joined, allowed_special={bos}, disallowed_special=())
    except UnicodeEncodeError:  # half a surrogate pair somewhere, which `tok.encode` replaces
        return [alone(text) for text in texts]
    docs = iter(np.split(ids, np.flatnonzero(ids == tok.bos)[1:]))
    return [next(docs) if is_plain else alone(text) for text, is_plain in zip(texts, plain)]


def _blocks(stream: _Stream, place: _Place, reader: BlockReader) -> Iterator[tuple[_Turn, TokenBlock]]:
    """Yield the blocks from `place` on, without end, having started each of them some turns ahead."""
    ahead = min(max(BLOCKS_AHEAD, 2 * stream.world_size), SHARED_BLOCKS_AHEAD)
    docs, whole_epoch = 0, (place.shard, place.block) == (0, 0)
    bad: set[tuple[int, int]] = set()  # (epoch, shard index)
    turns = _turns(stream, place.epoch, place.shard, place.block, bad)
    started = deque()
    while True:
        while len(started) <= ahead:
            request = _block_request(stream, turn := next(turns))
            started.append((turn, request, reader.start(request)))
        turn, request, future = started.popleft()
        if turn.shard == len(stream.shards):
            if whole_epoch and not docs:
                raise UserError(f"data.source={stream.config.source}: no documents to read for split {stream.split}")
            docs, whole_epoch = 0, True
        elif (turn.epoch, turn.shard_index) not in bad:
            try:
                block = reader.result(request, future)
            except CorruptShardError as error:
                if not stream.config.skip_bad_shards:
                    raise
                # Its other blocks are left out until the next epoch, when it is tried again: what is read must not
                # depend on what this process happens to have seen before.
                if stream.rank == 0 and all(turn.shard_index != index for _, index in bad):
                    print(f"warning: skipping a shard: {error}", file=sys.stderr, flush=True)
                bad.add((turn.epoch, turn.shard_index))
                continue
            docs += len(block.lengths)
            yield turn, block


def _turns(
    stream: _Stream, epoch: int, first_shard: int, first_block: int, bad: set[tuple[int, int]]
) -> Iterator[_Turn]:
    shards = stream.shards
    while True:
        for shard, shard_index in list(enumerate(stream.order(len(shards), epoch)))[first_shard:]:
            try:
                count = num_blocks(shards[shard_index])
            except CorruptShardError as error:
                yield _Turn(epoch, shard, 0, shard_index, 0, error)
                count = 0
            for block, block_index in list(enumerate(stream.order(count, epoch, shard_index)))[first_block:]:
                if (epoch, shard_index) in bad:
                    break
                yield _Turn(epoch, shard, block, shard_index, block_index)
            first_block = 0
        yield _Turn(epoch, len(shards), 0, 0, 0)
        epoch, first_shard = epoch + 1, 0


def _block_request(stream: _Stream, turn: _Turn) -> BlockRequest:
    if turn.error or turn.shard == len(stream.shards):
        return BlockRequest(None, functools.partial(_nothing, turn.error), 0)
    shard = stream.shards[turn.shard_index]
    path = None
    if stream.config.token_cache:
        path = stream.cache_folder(shard) / f"{turn.block_index:06d}.tokens"
    texts = functools.partial(read_block, shard, turn.block_index, stream.config.text_column)
    return BlockRequest(path, texts, turn.shard + turn.block)


def _nothing(error: CorruptShardError | None) -> list[str]:
    if error:
        raise error
    return []
