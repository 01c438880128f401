"""Batches of conversations for fine-tuning: rendered, packed without a cut, masked; the same rows for any ranks.

A row takes whole conversations, best fit (`packing`); what is left of it is filled up with <|bos|> and not learned.
Targets are what the assistant says, or everything for mid-training. Each target's weight is one over their number in
the whole step, so that the mean is over tokens, whatever the micro-batches and ranks: `loss.next_token` sums them up.

State: every batch comes with the loader's state after it, a plain value to keep in a checkpoint: how many conversations
were read, and which of them wait in the packing buffer. A loader made from it goes on bit for bit.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format, packing, prefetch
from nanochat.model import IGNORE
from nanochat.tasks import Task

STATE_VERSION = 1
RENDERERS, RENDERED_AHEAD = 4, 64  # threads, and conversations under way in them: the tokenizer lets others run

Stats = dict[str, float]
State = dict[str, Any]


class Packing(NamedTuple):
    """How conversations become rows.

    Attributes:
        rows_per_step: of a batch, all ranks together. micro_rows: of a micro-batch, of one rank.
        sequence_len: tokens T of a row of inputs; a conversation is cut to so many.
        assistant_only: learn what the assistant says; False: everything.
        epochs: passes over the task; None: without end.
        buffer_conversations: among which the packing chooses.
    """

    rows_per_step: int
    micro_rows: int
    sequence_len: int
    assistant_only: bool = True
    epochs: int | None = 1
    buffer_conversations: int = 100


class _Rendered(NamedTuple):
    """A conversation in the buffer: its number in the stream, its tokens, and which of them are learned."""

    number: int
    ids: np.ndarray
    learned: np.ndarray


class _Place:
    """How far a stream has come: conversations read, and of these dropped because nothing is left to learn."""

    def __init__(self, read: int = 0, dropped: int = 0, learned_tokens: int = 0) -> None:
        self.read, self.dropped, self.learned_tokens = read, dropped, learned_tokens


def batches(
    task: Task,
    tok: Tokenizer,
    how: Packing,
    *,
    rank: int = 0,
    world_size: int = 1,
    state: State | None = None,
    device: torch.device | str = "cpu",
    prefetch_batches: int = 4,
) -> Generator[tuple[dict[str, Tensor], State, Stats], None, None]:
    """Yield (this rank's batch, the state after it, statistics) to the end of the last epoch.

    Args:
        task: in whose order its rows are read. rank, world_size: which process of how many this is.
        state: goes on after the batch that came with it. device: where batches go.
        prefetch_batches: made ahead, in a thread.

    Yields:
        {"inputs", "targets": (rows_per_step / world_size, T) int64, "weights": the same shape, float32}; the last
        batch of the last epoch may have rows that hold padding alone.
        {"position": JSON-able}.
        {"share": of all conversations, packed before this batch; "epoch": the same of one epoch; "padding_fraction": of
        this batch; "dropped": conversations so far with nothing to learn; "learned_tokens" so far; "last": 1.0 with
        the last batch}.

    Raises:
        UserError: the rows do not divide, `state` is of another stream, or a row of the task is damaged.
    """
    if how.rows_per_step % (how.micro_rows * world_size):
        raise UserError(
            f"a step of {how.rows_per_step} rows does not divide into micro-batches of {how.micro_rows} rows on "
            f"{world_size} ranks: change device_batch_size or total_batch_size"
        )
    if how.sequence_len < 2 or not task.size:
        raise UserError(f"sequence_len={how.sequence_len}, {task.size} conversations: nothing to learn from")
    place, waiting = _restore(task, tok, how, state)
    steps = _steps(task, tok, how, place, waiting, rank, world_size)
    return _delivered(prefetch(steps, prefetch_batches), torch.device(device))


def _delivered(
    steps: Generator[tuple[dict[str, Tensor], State, Stats], None, None], device: torch.device
) -> Generator[tuple[dict[str, Tensor], State, Stats], None, None]:
    pin = device.type == "cuda"
    with contextlib.closing(steps):
        for batch, state, stats in steps:
            moved = {n: (x.pin_memory() if pin else x).to(device, non_blocking=True) for n, x in batch.items()}
            yield moved, state, stats


def _identity(task: Task, tok: Tokenizer, how: Packing) -> dict[str, Any]:
    """Return what decides the rows; not how many there are in a step."""
    made_of = how._replace(rows_per_step=0, micro_rows=0, epochs=None)._asdict()
    return {"task": task.name, "conversations": task.size, "tokenizer": tok.fingerprint[:16], **made_of}


def _restore(task: Task, tok: Tokenizer, how: Packing, state: State | None) -> tuple[_Place, list[int]]:
    """Return the place of a saved state and the numbers that wait in its buffer, or those of the beginning."""
    if state is None:
        return _Place(), []
    position = state["position"]
    was, now = position["made_of"], _identity(task, tok, how)
    changes = [f"{name} was {was.get(name)}, is {value}" for name, value in now.items() if was.get(name) != value]
    if position["version"] != STATE_VERSION or changes:
        raise UserError(f"cannot go on with other data ({'; '.join(changes)}): set it back, or start a new run")
    return _Place(position["read"], position["dropped"], position["learned_tokens"]), list(position["waiting"])


def _steps(
    task: Task,
    tok: Tokenizer,
    how: Packing,
    place: _Place,
    waiting: list[int],
    rank: int,
    world_size: int,
) -> Generator[tuple[dict[str, Tensor], State, Stats], None, None]:
    total = task.size * how.epochs if how.epochs else None
    with ThreadPoolExecutor(RENDERERS, "render") as threads:
        arrivals = _arrivals(task, tok, how, place, waiting, total, threads)
        plan = packing.plan(arrivals, how.sequence_len + 1, how.buffer_conversations, pad=True)
        rows = list(itertools.islice(plan, how.rows_per_step))
        while rows:
            kept = list(rows[-1].waiting)
            packed = [[one for one, *_ in row.pieces] for row in rows]
            before = place.read - len(kept) - sum(map(len, packed))
            learned = sum(int(one.learned[1:].sum()) for row in packed for one in row)
            place.learned_tokens += learned
            used = sum(len(one.ids) for row in packed for one in row)
            stats = {
                "epoch": before / task.size,
                "padding_fraction": 1 - used / (how.rows_per_step * (how.sequence_len + 1)),
                "dropped": place.dropped,
                "learned_tokens": place.learned_tokens,
            }
            made_of = _identity(task, tok, how)
            position = {**vars(place), "waiting": [one.number for one in kept], "made_of": made_of}
            mine = packed[rank::world_size]
            mine += [[]] * (how.rows_per_step // world_size - len(mine))
            weight = how.rows_per_step // how.micro_rows / max(learned, 1)  # the step averages its micro-batches
            # That this is the last batch shows when there is no row for another.
            rows = list(itertools.islice(plan, how.rows_per_step))
            stats |= ({"share": before / total} if total else {}) | ({} if rows else {"last": 1.0})
            state = {"position": {"version": STATE_VERSION, **position}}
            yield _batch(mine, how.sequence_len, tok.bos, weight), state, stats


def _batch(rows: list[list[_Rendered]], sequence_len: int, bos: int, weight: float) -> dict[str, Tensor]:
    """Return inputs, targets and weights of packed rows."""
    ids = np.full((len(rows), sequence_len + 1), bos, np.int64)
    learned = np.zeros((len(rows), sequence_len + 1), bool)
    for r, row in enumerate(rows):
        start = 0
        for one in row:
            stop = start + len(one.ids)
            ids[r, start:stop], learned[r, start + 1 : stop] = one.ids, one.learned[1:]
            start = stop
    inputs, all_targets, counts = (torch.from_numpy(x) for x in (ids[:, :-1].copy(), ids[:, 1:].copy(), learned[:, 1:]))
    return {"inputs": inputs, "targets": all_targets.masked_fill(~counts, IGNORE), "weights": counts.float() * weight}


def _arrivals(
    task: Task,
    tok: Tokenizer,
    how: Packing,
    place: _Place,
    waiting: list[int],
    total: int | None,
    threads: ThreadPoolExecutor,
) -> Iterator[tuple[int, _Rendered]]:
    """Yield (length, conversation) one after another, each counted in `place`."""

    def rendered(number: int) -> _Rendered:
        ids, mask = chat_format.render(tok, task.row(number % task.size), how.sequence_len)
        learned = np.array(mask, bool) if how.assistant_only else np.ones(len(ids), bool)
        return _Rendered(number, np.array(ids, np.int64), learned)

    fresh = iter(range(place.read, total)) if total is not None else itertools.count(place.read)
    numbers = itertools.chain(waiting, fresh)
    under_way = deque(threads.submit(rendered, number) for number in itertools.islice(numbers, RENDERED_AHEAD))
    arrived = 0
    while under_way:
        one = under_way.popleft().result()
        under_way.extend(threads.submit(rendered, number) for number in itertools.islice(numbers, 1))
        if arrived >= len(waiting):
            place.read += 1
        if one.learned[1:].any():
            yield len(one.ids), one
            arrived += 1
        else:
            place.dropped += 1
