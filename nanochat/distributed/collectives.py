"""Messages between the ranks of a job, on the CPU by gloo: plain values, and errors that every rank raises.

A rank that fails alone leaves the others in a collective that it never reaches: see `raise_on_any_failure`.
"""

import contextlib
import datetime
import time
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from nanochat.config import UserError

CONNECT_TIMEOUT = datetime.timedelta(minutes=10)
# A rank that exits is noticed at once, by its closed connection. This is for one that hangs, or writes for very long.
TIMEOUT = datetime.timedelta(hours=2)
ANSWER_SECONDS = 2.0  # for the other ranks to show that they are alive, once one of them is lost


class LostRankError(UserError):
    """Another rank of the job has exited, or does not answer."""


class ControlGroup(NamedTuple):
    """The ranks that exchange messages, seen from one of them; `group` is None where it is the only one.

    One thread uses it at a time.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


_groups: weakref.WeakKeyDictionary[Any, tuple[ControlGroup, ControlGroup]] = weakref.WeakKeyDictionary()


def control_group(*, background: bool = False) -> ControlGroup:
    """Return the job's group for messages of the main thread, or of its one background thread (checkpoint writes).

    The first call in a job is collective: it connects both groups, and `init` makes it. `close` disconnects them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ControlGroup()
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = (_connect(), _connect())
    return _groups[world][background]


def _connect() -> ControlGroup:
    group: Any = dist.new_group(backend="gloo", timeout=CONNECT_TIMEOUT)
    c10d._set_pg_timeout(TIMEOUT, group)
    return ControlGroup(dist.get_rank(), dist.get_world_size(), group)


def all_gather_object(value: Any, *, group: ControlGroup | None = None) -> list[Any]:
    """Return the values of all ranks, in the order of ranks. Raises LostRankError, as all functions here."""
    group = group or control_group()
    if group.size == 1:
        return [value]
    gathered: list[Any] = [None] * group.size
    with _naming_lost_ranks(group):
        dist.all_gather_object(gathered, value, group=group.group)
    return gathered


def broadcast_object(value: Any = None, *, group: ControlGroup | None = None) -> Any:
    """Return rank 0's value on every rank; the other ranks' are ignored."""
    group = group or control_group()
    if group.size == 1:
        return value
    box = [value]
    with _naming_lost_ranks(group):
        dist.broadcast_object_list(box, group=group.group, group_src=0)
    return box[0]


@contextlib.contextmanager
def raise_on_any_failure(group: ControlGroup | None = None) -> Iterator[None]:
    """Run a block on every rank; where it fails on some, all raise the error of the first of them.

    A `UserError` keeps its class. Any other error is a bug: the rank where it happened raises it as it is, the others
    raise a RuntimeError that names this rank.
    """
    group = group or control_group()
    if group.size == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except LostRankError:
        raise  # the ranks cannot agree any more
    except Exception as caught:
        error = caught
    kind = type(error) if isinstance(error, UserError) else type(error).__name__
    failures = all_gather_object(error and (kind, str(error)), group=group)
    first = next((rank for rank, failure in enumerate(failures) if failure), None)
    if first is None:
        return
    kind, message = failures[first]
    if error and (first == group.rank or isinstance(kind, str)):
        raise error
    if isinstance(kind, str):
        raise RuntimeError(f"rank {first} failed: {kind}: {message}")
    raise kind.__new__(kind, message) from error  # without __init__, whose arguments differ between classes


@contextlib.contextmanager
def _naming_lost_ranks(group: ControlGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # dist's own classes derive from it, and gloo raises it
        lost = _lost_ranks(group)
        name = f"rank {' or '.join(map(str, lost))}" if lost else "another rank"
        raise LostRankError(f"{name} of the job has exited or does not answer; its output says why") from error


def _lost_ranks(group: ControlGroup) -> list[int]:
    """Return the ranks that do not set a mark in the job's store, as every rank does that is alive."""
    others, end = set(range(group.size)) - {group.rank}, time.monotonic() + ANSWER_SECONDS
    silent: set[int] = set()
    with contextlib.suppress(RuntimeError, ValueError):  # the store's rank may exit meanwhile, or be the lost one
        store = c10d._get_default_store()
        store.set(f"alive {group.rank}", "")
        while others and time.monotonic() < end:
            silent = others = {rank for rank in others if not store.check([f"alive {rank}"])}
            time.sleep(0.02)
    return sorted(silent)
