"""Batches of conversations for fine-tuning, packed whole (best fit) into rows padded with <|bos|>.

The weights of the targets make the loss a mean over the tokens of the whole step, for any number of micro-batches and
ranks. Each batch comes with the loader's state after it, a JSON value: the number of conversations read, and which of
them are in the packing buffer. A loader restored from it continues bit for bit.
"""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format, prefetch
from nanochat.data import packing as best_fit
from nanochat.model import IGNORE
from nanochat.tasks import Task

STATE_VERSION = 1
RENDER_THREADS, RENDERED_AHEAD = 4, 64  # the tokenizer releases the GIL

Stats = dict[str, float]
State = dict[str, Any]
Batches = Generator[tuple[dict[str, Tensor], State, Stats], None, None]


class Packing(NamedTuple):
    """How conversations are packed into rows.

    Attributes:
        rows_per_step: over all ranks. micro_rows: rows of a micro-batch of one rank.
        sequence_len: tokens T per input row; longer conversations are truncated.
        assistant_only: loss on the assistant's tokens only; False: on all tokens.
        epochs: passes over the task; None: unlimited.
        buffer_conversations: conversations to choose from.
    """

    rows_per_step: int
    micro_rows: int
    sequence_len: int
    assistant_only: bool = True
    epochs: int | None = 1
    buffer_conversations: int = 100


class _Conversation(NamedTuple):
    index: int  # in the stream of all epochs
    ids: np.ndarray
    mask: np.ndarray  # tokens with loss


class _Stream(NamedTuple):
    task: Task
    tok: Tokenizer
    packing: Packing

    @property
    def total(self) -> int | None:
        return self.task.size * self.packing.epochs if self.packing.epochs else None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the rows, except how many there are per step."""
        settings = self.packing._replace(rows_per_step=0, micro_rows=0, epochs=None)._asdict()
        task = {"task": self.task.name, "conversations": self.task.size}
        return {**task, "tokenizer": self.tok.fingerprint[:16], **settings}

    def render(self, index: int) -> _Conversation:
        conversation = self.task.row(index % self.task.size)
        ids, mask = chat_format.render(self.tok, conversation, self.packing.sequence_len)
        return _Conversation(index, np.array(ids, np.int64), np.array(mask, bool) | (not self.packing.assistant_only))


@dataclasses.dataclass
class _Cursor:
    read: int = 0
    dropped: int = 0  # conversations without targets
    learned_tokens: int = 0  # targets packed
    waiting: Sequence[int] = ()  # conversations in the packing buffer


def batches(
    task: Task,
    tok: Tokenizer,
    packing: Packing,
    *,
    rank: int = 0,
    world_size: int = 1,
    state: State | None = None,
    device: torch.device | str = "cpu",
    prefetch_batches: int = 4,
) -> Batches:
    """Yield (this rank's batch, the state after it, statistics) until the end of the last epoch.

    Args:
        task: read in its order. state: continue after the batch that this state came with.
        prefetch_batches: prepared ahead of time, in a thread.

    Yields:
        {"inputs", "targets": (rows_per_step / world_size, T) int64, "weights": the same shape, float32}; rows of the
        last batch may be padding only.
        {"position": JSON value}.
        {"share": fraction of all conversations in earlier batches; "epoch": the same, in epochs; "padding_fraction": of
        this batch; "dropped": conversations without targets so far; "learned_tokens": targets so far; "last": 1.0 for
        the last batch}.

    Raises:
        UserError: the rows are not divisible, `state` is from other data, or an example of the task is invalid.
    """
    if packing.rows_per_step % (packing.micro_rows * world_size):
        raise UserError(
            f"{packing.rows_per_step} rows per step are not divisible into micro-batches of {packing.micro_rows} rows "
            f"on {world_size} ranks: change device_batch_size or total_batch_size"
        )
    if packing.sequence_len < 2 or not task.size:
        raise UserError(f"no training targets: sequence_len={packing.sequence_len}, {task.size} conversations")
    stream = _Stream(task, tok, packing)
    steps = _steps(stream, _restore(stream, state), rank, world_size)
    return _to_device(prefetch(steps, prefetch_batches), torch.device(device))


def _to_device(steps: Batches, device: torch.device) -> Batches:
    pin = device.type == "cuda"
    with contextlib.closing(steps):
        for batch, state, stats in steps:
            moved = {n: (x.pin_memory() if pin else x).to(device, non_blocking=True) for n, x in batch.items()}
            yield moved, state, stats


def _restore(stream: _Stream, state: State | None) -> _Cursor:
    if state is None:
        return _Cursor()
    position = dict(state["position"])
    version, saved = position.pop("version"), position.pop("made_of")
    changes = [f"{k} was {saved.get(k)}, is {x}" for k, x in stream.fingerprint.items() if saved.get(k) != x]
    if version != STATE_VERSION or changes:
        raise UserError(f"cannot resume with other data ({'; '.join(changes)}): change it back, or start a new run")
    return _Cursor(**position)


def _steps(stream: _Stream, cursor: _Cursor, rank: int, world_size: int) -> Batches:
    packing, total = stream.packing, stream.total
    row_tokens = packing.sequence_len + 1
    with ThreadPoolExecutor(RENDER_THREADS, "render") as threads:
        conversations = _conversations(stream, cursor, threads)
        plan = best_fit.plan(conversations, row_tokens, packing.buffer_conversations, pad=True)
        packed = list(itertools.islice(plan, packing.rows_per_step))
        while packed:
            cursor.waiting = [c.index for c in packed[-1].waiting]
            rows = [[c for c, *_ in row.pieces] for row in packed]
            before = cursor.read - len(cursor.waiting) - sum(map(len, rows))
            n_targets = sum(int(c.mask[1:].sum()) for row in rows for c in row)
            n_tokens = sum(len(c.ids) for row in rows for c in row)
            cursor.learned_tokens += n_targets
            stats = {
                "epoch": before / stream.task.size,
                "padding_fraction": 1 - n_tokens / (packing.rows_per_step * row_tokens),
                "dropped": cursor.dropped,
                "learned_tokens": cursor.learned_tokens,
            }
            position = {"version": STATE_VERSION, **vars(cursor), "made_of": stream.fingerprint}
            rank_rows = rows[rank::world_size]
            rank_rows += [[]] * (packing.rows_per_step // world_size - len(rank_rows))
            micro_steps = packing.rows_per_step // packing.micro_rows  # whose losses are averaged
            batch = _batch(rank_rows, packing.sequence_len, stream.tok.bos, micro_steps / max(n_targets, 1))
            # Only reading ahead shows that this is the last batch.
            packed = list(itertools.islice(plan, packing.rows_per_step))
            stats |= ({"share": before / total} if total else {}) | ({} if packed else {"last": 1.0})
            yield batch, {"position": position}, stats


def _batch(rows: list[list[_Conversation]], sequence_len: int, bos: int, weight: float) -> dict[str, Tensor]:
    ids = np.full((len(rows), sequence_len + 1), bos, np.int64)
    mask = np.zeros((len(rows), sequence_len + 1), bool)
    for r, row in enumerate(rows):
        start = 0
        for c in row:
            stop = start + len(c.ids)
            ids[r, start:stop], mask[r, start + 1 : stop] = c.ids, c.mask[1:]
            start = stop
    inputs, targets, counted = (torch.from_numpy(x) for x in (ids[:, :-1].copy(), ids[:, 1:].copy(), mask[:, 1:]))
    return {"inputs": inputs, "targets": targets.masked_fill(~counted, IGNORE), "weights": counted.float() * weight}


def _conversations(
    stream: _Stream, cursor: _Cursor, threads: ThreadPoolExecutor
) -> Iterator[tuple[int, _Conversation]]:
    """Yield (length, conversation): the waiting ones, then new ones, which advance the cursor."""
    new = itertools.count(cursor.read) if stream.total is None else range(cursor.read, stream.total)
    indices = itertools.chain(cursor.waiting, new)
    pending = deque(threads.submit(stream.render, index) for index in itertools.islice(indices, RENDERED_AHEAD))
    n_waiting = len(cursor.waiting)
    while pending:
        conversation = pending.popleft().result()
        pending.extend(threads.submit(stream.render, index) for index in itertools.islice(indices, 1))
        if n_waiting:
            n_waiting -= 1
        else:
            cursor.read += 1
        if conversation.mask[1:].any():
            yield len(conversation.ids), conversation
        else:
            cursor.dropped += 1
