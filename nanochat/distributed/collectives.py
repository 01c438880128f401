"""What the processes of a job tell each other on the side: plain values, and errors that all of them raise alike.

A step of a job that touches the disk must end the same way on every rank: one that fails alone leaves the others in
a collective that it never reaches. `together` makes the failure of one the failure of all. Values travel as JSON
through a gloo group of its own, on the CPU, whatever the job's own backend is.
"""

import contextlib
import datetime
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.config import UserError

# A rank that ends is noticed at once, by its closed connection. This is for one that hangs, or writes for very long.
TIMEOUT = datetime.timedelta(hours=2)


class LostRankError(UserError):
    """Another process of the job has ended, or does not answer."""


class ControlGroup(NamedTuple):
    """The processes of a job, seen from one of them; `group` is None where it is the only one.

    One conversation at a time: two threads that talk need a `join()` each.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


def create_group() -> ControlGroup:
    """Return all ranks of the job with a line of their own; every rank calls this at the same point."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ControlGroup()
    return ControlGroup(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=TIMEOUT))


def destroy_group(ranks: ControlGroup) -> None:
    """Close the line, if the job has not ended already."""
    if ranks.group is not None and dist.is_initialized():
        dist.destroy_process_group(ranks.group)


def all_gather_ints(ranks: ControlGroup, numbers: Tensor) -> Tensor:
    """Return what every rank gave, (ranks, …): an int64 tensor on the CPU, of one shape on all of them."""
    if ranks.size == 1:
        return numbers[None]
    found = [torch.empty_like(numbers) for _ in range(ranks.size)]
    with _noticing_loss():
        dist.all_gather(found, numbers.contiguous(), group=ranks.group)
    return torch.stack(found)


def all_gather_object(ranks: ControlGroup, value: Any) -> list[Any]:
    """Return what every rank gave, in the order of ranks: any value that JSON holds."""
    if ranks.size == 1:
        return [value]
    data = json.dumps(value).encode()
    lengths = all_gather_ints(ranks, torch.tensor([len(data)])).flatten().tolist()
    buffer = torch.zeros(max(lengths), dtype=torch.uint8)
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = [torch.empty_like(buffer) for _ in range(ranks.size)]
    with _noticing_loss():
        dist.all_gather(found, buffer, group=ranks.group)
    return [json.loads(x[:length].numpy().tobytes()) for x, length in zip(found, lengths)]


def broadcast_object(ranks: ControlGroup, value: Any = None) -> Any:
    """Return rank 0's value, which JSON holds, on every rank; what the others give does not count."""
    if ranks.size == 1:
        return value
    data = json.dumps(value).encode() if ranks.rank == 0 else b""
    length = torch.tensor([len(data)])
    with _noticing_loss():
        dist.broadcast(length, group=ranks.group, group_src=0)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if ranks.rank == 0:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, group=ranks.group, group_src=0)
    return json.loads(buffer.numpy().tobytes())


@contextlib.contextmanager
def raise_on_any_failure(ranks: ControlGroup) -> Iterator[None]:
    """Run a block on every rank; where it fails on some, all raise the error of the first of them.

    A `UserError` keeps its class. What is no `UserError` is a fault of the program: the rank that met it raises it as
    it is, the others say who did.
    """
    if ranks.size == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except LostRankError:
        raise  # there is nobody to tell
    except Exception as caught:
        error = caught
    found = all_gather_object(
        ranks, None if error is None else [type(error).__name__, str(error), isinstance(error, UserError)]
    )
    first = next((rank for rank, failure in enumerate(found) if failure is not None), None)
    if first is None:
        return
    name, message, for_people = found[first]
    if error is not None and (first == ranks.rank or not for_people):
        raise error
    if for_people:
        raise _error_classes().get(name, UserError)(message) from error
    raise RuntimeError(f"rank {first} failed: {name}: {message}") from error


@contextlib.contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # dist's own classes are of this one, and gloo raises it plainly
        raise LostRankError("another process of the job has ended or does not answer; its output says why") from error


def _error_classes(base: type[UserError] = UserError) -> dict[str, type[UserError]]:
    found = {base.__name__: base}
    for derived in base.__subclasses__():
        found.update(_error_classes(derived))
    return found
