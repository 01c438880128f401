"""Batches of conversations for fine-tuning, packed whole (best fit) into rows padded with <|bos|>.

The weights of the targets make the loss a mean over the tokens of the whole step, for any number of micro-batches and
ranks.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping
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
PREFETCHED_BATCHES = 4

State = dict[str, Any]
Batches = Generator[tuple[dict[str, Tensor], State, dict[str, float]], None, None]


class Packing(NamedTuple):
    """How conversations are packed into rows."""

    rows_per_step: int  # over all ranks
    micro_rows: int  # rows of a micro-batch of one rank
    sequence_len: int  # tokens T per input row
    assistant_only: bool = True  # loss on the assistant's tokens only; False: on all tokens
    long_conversations: chat_format.TooLong = "truncate"  # what to do with more tokens than T
    epochs: int | None = 1  # passes over the task; None: unlimited
    buffer_conversations: int = 100  # to choose from


class Conversation(NamedTuple):
    index: int  # in the stream of all epochs
    ids: np.ndarray
    mask: np.ndarray  # tokens with loss
    shortened: bool


def batches(
    task: Task,
    tok: Tokenizer,
    packing: Packing,
    *,
    rank: int = 0,
    world_size: int = 1,
    state: State | None = None,
    device: torch.device | str = "cpu",
) -> Batches:
    """Yield (this rank's batch, the state after it, statistics) until the end of the last epoch.

    A batch is {"inputs", "targets": (rows_per_step / world_size, T) int64, "weights": the same shape, float32}; rows of
    the last one may be padding only. An epoch without any target raises a UserError. Statistics are "share": fraction
    of all conversations in earlier batches; "epoch": the same, in epochs; "padding_fraction": of this batch; "dropped":
    conversations without targets so far; "learned_tokens": targets so far; "last": 1.0 for the last batch.

    Args:
        task: read in its order.
        state: a JSON value; continue bit for bit after the batch that it came with.
    """
    if packing.rows_per_step % (packing.micro_rows * world_size):
        raise UserError(
            f"{packing.rows_per_step} rows per step are not divisible into micro-batches of {packing.micro_rows} rows "
            f"on {world_size} ranks: change device_batch_size or total_batch_size"
        )
    if packing.sequence_len < 2 or not task.size:
        raise UserError(f"no training targets: sequence_len={packing.sequence_len}, {task.size} conversations")
    # Everything that determines the rows, except how many there are per step.
    settings = packing._replace(rows_per_step=0, micro_rows=0, epochs=None)._asdict()
    made_of = {"task": task.name, "conversations": task.size, "tokenizer": tok.fingerprint[:16], **settings}
    position = {"version": STATE_VERSION, "waiting": [], "learned_tokens": 0}
    position |= {"read": 0, "dropped": 0, "too_long": 0, "shortened": 0}  # counts of conversations
    if state is not None:
        position |= state["position"]
        saved = {"long_conversations": "truncate"} | position["made_of"]  # older states do not have it
        changes = [f"{name} was {saved.get(name)}, is {x}" for name, x in made_of.items() if saved.get(name) != x]
        if position["version"] != STATE_VERSION or changes:
            raise UserError(f"cannot resume with other data ({'; '.join(changes)}): change it back, or start a new run")
    steps = _steps(task, tok, packing, {**position, "made_of": made_of}, rank, world_size)
    return _to_device(prefetch(steps, PREFETCHED_BATCHES), torch.device(device))


def _to_device(steps: Batches, device: torch.device) -> Batches:
    pin = device.type == "cuda"
    with contextlib.closing(steps):
        for batch, state, stats in steps:
            moved = {n: (x.pin_memory() if pin else x).to(device, non_blocking=True) for n, x in batch.items()}
            yield moved, state, stats


def _steps(
    task: Task, tok: Tokenizer, packing: Packing, position: dict[str, Any], rank: int, world_size: int
) -> Batches:
    total = task.size * packing.epochs if packing.epochs else None
    row_tokens = packing.sequence_len + 1
    micro_steps = packing.rows_per_step // packing.micro_rows  # of all ranks, whose losses are averaged
    now = dict(position)  # its counts as of the last conversation that was read

    def render(index: int) -> Conversation:
        ids, mask = chat_format.render(tok, task.row(index % task.size), assistant_only=packing.assistant_only)
        kept = chat_format.kept_tokens(tok, ids, packing.sequence_len, packing.long_conversations)
        return Conversation(index, np.array(ids[:kept], np.int64), np.array(mask[:kept], bool), kept < len(ids))

    def conversations(threads: ThreadPoolExecutor) -> Iterator[tuple[int, Conversation]]:
        """Yield (length, conversation): those that wait in the packing buffer, then new ones."""
        first = position["read"]
        new = itertools.count(first) if total is None else range(first, total)
        indices = itertools.chain(position["waiting"], new)
        pending = deque(threads.submit(render, index) for index in itertools.islice(indices, RENDERED_AHEAD))
        while pending:
            conversation = pending.popleft().result()
            pending.extend(threads.submit(render, index) for index in itertools.islice(indices, 1))
            has_targets = bool(conversation.mask[1:].any())
            if conversation.index >= now["read"]:
                now["read"] = conversation.index + 1
                now["dropped"] += not has_targets
                now["too_long"] += conversation.shortened and not has_targets
                now["shortened"] += conversation.shortened and has_targets
            if has_targets:
                yield len(conversation.ids), conversation
            elif now["dropped"] == now["read"] >= task.size:
                none = f"none of the {task.size:,} conversations has anything to learn within"
                why = "; ".join(_skipped(now, packing))
                raise UserError(f"{task.name}: {none} {packing.sequence_len} tokens (context): {why}")

    with ThreadPoolExecutor(RENDER_THREADS, "render") as threads:
        plan = best_fit.plan(conversations(threads), row_tokens, packing.buffer_conversations, pad=True)
        packed = list(itertools.islice(plan, packing.rows_per_step))
        while packed:
            rows = [[conversation for conversation, *_ in row.pieces] for row in packed]
            now["waiting"] = [conversation.index for conversation in packed[-1].waiting]
            before = now["read"] - len(now["waiting"]) - sum(map(len, rows))
            n_targets = sum(int(c.mask[1:].sum()) for row in rows for c in row)
            n_tokens = sum(len(c.ids) for row in rows for c in row)
            now["learned_tokens"] += n_targets
            stats = {
                "epoch": before / task.size,
                "padding_fraction": 1 - n_tokens / (packing.rows_per_step * row_tokens),
                "dropped": now["dropped"],
                "learned_tokens": now["learned_tokens"],
            }
            state = {"position": {**now, "skipped": _skipped(now, packing)}}
            rank_rows = rows[rank::world_size]
            rank_rows += [[]] * (packing.rows_per_step // world_size - len(rank_rows))
            batch = _batch(rank_rows, packing.sequence_len, tok.bos, micro_steps / max(n_targets, 1))
            # Only reading ahead shows that this is the last batch.
            packed = list(itertools.islice(plan, packing.rows_per_step))
            stats |= ({"share": before / total} if total else {}) | ({} if packed else {"last": 1.0})
            yield batch, state, stats


def _skipped(now: Mapping[str, Any], packing: Packing) -> list[str]:
    """Return what was not trained on of the conversations read so far, a sentence each."""
    keep = "long_conversations=whole_turns or " if packing.long_conversations == "drop" else ""
    longer = (
        f"longer than {packing.sequence_len} tokens; {keep}a base model with a longer model.sequence_len keeps them"
    )
    sentences = {
        f"dropped: {longer}": now["too_long"],
        f"shortened: {longer}": now["shortened"],
        "dropped: their answers are all switched off": now["dropped"] - now["too_long"],
    }
    read = now["read"]
    return [f"{n:,} of {read:,} conversations ({n / read:.1%}) {text}" for text, n in sentences.items() if n]


def _batch(rows: list[list[Conversation]], sequence_len: int, bos: int, weight: float) -> dict[str, Tensor]:
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
