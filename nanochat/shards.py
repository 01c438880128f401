"""Which part of a sharded tensor lies in this process, and one checksum per tensor over all processes.

A leaf is a plain tensor, equal on every rank, or a DTensor with even shards. What several ranks hold a copy of is
written by one of them, taken in turns over the leaves, and counts once in the checksum.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from nanochat import ranks as jobs
from nanochat.config import UserError
from nanochat.fingerprint import checksum
from nanochat.ranks import Ranks


class Part(NamedTuple):
    """A block of a tensor: where it begins and how large it is, per dimension; `number` counts the tensor's blocks."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    number: int = 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the block in the whole tensor."""
        return tuple(slice(begin, begin + size) for begin, size in zip(self.offsets, self.sizes))


def part(leaf: Tensor, name: str = "tensor") -> Part:
    """Return which part of `leaf` this process holds.

    Raises:
        UserError: the shards are not even, or `leaf` is not yet reduced (a placement other than Shard and Replicate).
    """
    sizes, offsets, number = list(leaf.shape), [0] * leaf.ndim, 0
    if isinstance(leaf, DTensor):
        coordinate = leaf.device_mesh.get_coordinate()
        if coordinate is None:
            raise UserError(f"{name} lies on a mesh that leaves out some of the job's processes")
        for here, count, placement in zip(coordinate, leaf.device_mesh.shape, leaf.placements):
            if type(placement) is Shard and sizes[placement.dim] % count == 0:
                sizes[placement.dim] //= count
                offsets[placement.dim] += here * sizes[placement.dim]
                number = number * count + here
            elif type(placement) is not Replicate:
                raise UserError(
                    f"{name} {tuple(leaf.shape)} is placed {placement} over {count} ranks: checkpoints hold tensors "
                    "that are replicated or cut into even shards"
                )
    return Part(tuple(offsets), tuple(sizes), number)


def local(leaf: Tensor) -> Tensor:
    """Return this process's part of `leaf` as a plain tensor over the same memory."""
    return (leaf.to_local() if isinstance(leaf, DTensor) else leaf).detach()


def assemble(here: Tensor, like: Tensor) -> Tensor:
    """Return the tensor that is sharded as `like` and whose local part is `here`."""
    if not isinstance(like, DTensor):
        return here
    return DTensor.from_local(
        here, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def survey(ranks: Ranks, parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return (ranks, leaves, 2): the number of every rank's part of every leaf, and its checksum; equal on all ranks.

    The checksums are computed where the tensors lie, and cross to the host in one transfer.
    """
    sums = [checksum(tensor, parts[name].offsets) for name, tensor in tensors.items()]
    host = torch.stack(sums).cpu() if sums else torch.empty(0, dtype=torch.int64)
    numbers = torch.tensor([parts[name].number for name in tensors], dtype=torch.int64)
    return jobs.gather_ints(ranks, torch.stack([numbers, host], dim=-1))


def fingerprints(found: Tensor, names: list[str]) -> dict[str, str]:
    """Return the checksum of each whole leaf in hexadecimal, from what `survey` found.

    Raises:
        UserError: names the first leaf of which two ranks hold different copies.
    """
    whole = {}
    for i, name in enumerate(names):
        seen: dict[int, tuple[int, int]] = {}
        for rank, (number, value) in enumerate(found[:, i].tolist()):
            first, before = seen.setdefault(number, (rank, value))
            if value != before:
                raise UserError(f"{name} differs between rank {first} and rank {rank}, which should hold the same")
        whole[name] = f"{sum(value for _, value in seen.values()) % 2**64:016x}"
    return whole


def written_here(found: Tensor, rank: int) -> list[bool]:
    """Return for every leaf whether this rank is the one of those that hold its part to write it."""
    mine = []
    for i in range(found.shape[1]):
        holders = (found[:, i, 0] == found[rank, i, 0]).nonzero().flatten().tolist()
        mine.append(holders[i % len(holders)] == rank)
    return mine


def chunk(sizes: tuple[int, ...], itemsize: int, limit_bytes: int = 2**24) -> list[int]:
    """Return the shape of even pieces of a block, cut along its first dimensions until they are small.

    Ranks that read a part of what one rank wrote read whole pieces.
    """
    pieces = list(sizes)
    for dim in range(len(pieces)):
        while math.prod(pieces) * itemsize > limit_bytes and pieces[dim] % 2 == 0:
            pieces[dim] //= 2
    return pieces
