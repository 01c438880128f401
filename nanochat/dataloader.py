"""Batches of packed rows: shards → blocks → documents → tokens → best fit; the same rows for any number of ranks.

Order: every epoch permutes the shards, each shard's blocks and each block's documents, by the seed and the epoch and
nothing else. All ranks plan all rows, from lengths alone; each copies the tokens of its own rows only. Global row r of
a step goes to rank r % world_size, as its row r // world_size.

State: every batch comes with the loader's state after it, a plain value to keep in a checkpoint: the place in the
stream and the documents in the packing buffer. A loader made from it goes on bit for bit, with any number of ranks.

Threads: one packs `prefetch_batches` ahead, a few more read and tokenise blocks for it. Closing the generator, or
letting go of it, stops them all; so does the end of the main thread.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from nanochat import packing
from nanochat.background import run_ahead
from nanochat.config import UserError
from nanochat.dataset import BadShardError, DataConfig, Shard, num_blocks, read_block, resolve
from nanochat.runtime import base_dir
from nanochat.token_cache import Block, BlockReader, Request
from nanochat.tokenizer import RUN_CHARS, Tokenizer

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
    stream = _Stream(config, tok, split, tuple(resolve(config, split)), seed, sequence_len + 1, rank, world_size)
    place, held = _restore(stream, state) if state else (_Place(), [])
    device = torch.device(device)
    steps = functools.partial(_steps, stream, place, held, rows_per_step, device)
    return _delivered(run_ahead(steps, config.prefetch_batches), device)


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
    blocks: Iterator[tuple["_Turn", Block]],
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
    error: BadShardError | None = None


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


def _blocks(stream: _Stream, place: _Place, reader: BlockReader) -> Iterator[tuple[_Turn, Block]]:
    """Yield the blocks from `place` on, without end, having started each of them some turns ahead."""
    ahead = min(max(BLOCKS_AHEAD, 2 * stream.world_size), SHARED_BLOCKS_AHEAD)
    docs, whole_epoch = 0, (place.shard, place.block) == (0, 0)
    bad: set[tuple[int, int]] = set()  # (epoch, shard index)
    turns = _turns(stream, place.epoch, place.shard, place.block, bad)
    started = deque()
    while True:
        while len(started) <= ahead:
            request = _request(stream, turn := next(turns))
            started.append((turn, request, reader.start(request)))
        turn, request, future = started.popleft()
        if turn.shard == len(stream.shards):
            if whole_epoch and not docs:
                raise UserError(f"data.source={stream.config.source}: no documents to read for split {stream.split}")
            docs, whole_epoch = 0, True
        elif (turn.epoch, turn.shard_index) not in bad:
            try:
                block = reader.result(request, future)
            except BadShardError as error:
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
            except BadShardError as error:
                yield _Turn(epoch, shard, 0, shard_index, 0, error)
                count = 0
            for block, block_index in list(enumerate(stream.order(count, epoch, shard_index)))[first_block:]:
                if (epoch, shard_index) in bad:
                    break
                yield _Turn(epoch, shard, block, shard_index, block_index)
            first_block = 0
        yield _Turn(epoch, len(shards), 0, 0, 0)
        epoch, first_shard = epoch + 1, 0


def _request(stream: _Stream, turn: _Turn) -> Request:
    if turn.error or turn.shard == len(stream.shards):
        return Request(None, functools.partial(_nothing, turn.error), 0)
    shard = stream.shards[turn.shard_index]
    path = None
    if stream.config.token_cache:
        path = stream.cache_folder(shard) / f"{turn.block_index:06d}.tokens"
    texts = functools.partial(read_block, shard, turn.block_index, stream.config.text_column)
    return Request(path, texts, turn.shard + turn.block)


def _nothing(error: BadShardError | None) -> list[str]:
    if error:
        raise error
    return []
