"""What a checkpoint says about itself (the item `meta`), and whether its bytes agree.

orbax and the disk do not notice a flipped byte, swapped leaves, a missing leaf or a wrong shape or dtype, so the header
has shape, dtype and checksum of everything. Checksums add up over shards: any sharding can be read and verified.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from nanochat import distributed, text
from nanochat.checkpoint import storage
from nanochat.config import UserError
from nanochat.distributed import ControlGroup, raise_on_any_failure

FORMAT = 1

Specs = Mapping[str, Mapping[str, Any]]  # name → shape, dtype and checksum, as JSON


class CorruptCheckpointError(UserError):
    """A checkpoint that cannot be read, or whose bytes are not those that were saved."""


# Checksums that add up over shards


def checksum(shard: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
    """Return a 64-bit checksum of a tensor's bits and their positions.

        Σ bits(x[i, j, …]) · w₀[i] · w₁[j] · …   modulo 2**64,  with odd pseudo-random weights per dimension.

    The checksums of the shards of a tensor add up to its checksum. A change of one element is always detected (an odd
    multiple of less than 2**32 is not 0 modulo 2**64); swapped elements, rows or leaves are missed with probability
    2**-32. Runs on the tensor's device in bounded memory, without synchronization; returns a 0-d int64 tensor.

    Args:
        shard: the tensor, or its block that starts at `offsets`; any dtype of 1, 2, 4 or 8 bytes.
    """
    bits = torch.atleast_1d(shard.detach())
    starts = list(offsets or [0] * bits.ndim)
    if bits.element_size() == 8:  # as halves: the difference of an element has to stay below 2**32
        bits = bits.contiguous().view(torch.int32)
        starts[-1] *= 2
    else:
        bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[bits.element_size()])
    # Large enough to amortize kernel launches, small enough for the cache (CPU) and for bounded memory (GPU).
    chunk_elements = min(2**24 if bits.is_cuda else 2**19, bits.numel())
    # One buffer for all chunks: touching fresh memory costs more than the sums.
    scratch = torch.empty(chunk_elements, dtype=torch.int64, device=bits.device)
    return _weighted_sum(bits, starts, scratch)


def _weighted_sum(bits: Tensor, starts: list[int], scratch: Tensor) -> Tensor:
    if bits.numel() > scratch.numel():
        dim = next(d for d, n in enumerate(bits.shape) if n > 1)
        half = bits.shape[dim] // 2
        middle = [start + half if d == dim else start for d, start in enumerate(starts)]
        first = _weighted_sum(bits.narrow(dim, 0, half), starts, scratch)
        return first + _weighted_sum(bits.narrow(dim, half, bits.shape[dim] - half), middle, scratch)
    total = scratch[: bits.numel()].view(bits.shape).copy_(bits)
    for dim in reversed(range(bits.ndim)):
        total = total.mul_(_odd_weights(dim, starts[dim], bits.shape[dim], bits.device)).sum(-1)
    return total


def _odd_weights(dim: int, start: int, count: int, device: torch.device) -> Tensor:
    # The mixing steps of splitmix64 (Steele, Lea, Flood 2014) in wrapping int64; `& mask` makes >> a logical shift.
    x = torch.arange(start + 1, start + 1 + count, dtype=torch.int64, device=device)
    x = (x + (dim << 40)) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 31) & (2**33 - 1))) | 1


# Shards of a leaf: a plain tensor, equal on every rank, or a DTensor with even shards


class LocalShard(NamedTuple):
    """The block of a tensor that a process holds."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    index: int = 0  # among the distinct blocks of the tensor


def local_shard(leaf: Tensor, name: str) -> LocalShard:
    """Return which block of `leaf` this process holds; UserError if the shards are uneven or partial sums."""
    sizes, offsets, index = list(leaf.shape), [0] * leaf.ndim, 0
    if isinstance(leaf, DTensor):
        coordinate = leaf.device_mesh.get_coordinate() or ()
        for position, count, placement in zip(coordinate, leaf.device_mesh.shape, leaf.placements, strict=True):
            if type(placement) is Shard and sizes[placement.dim] % count == 0:
                sizes[placement.dim] //= count
                offsets[placement.dim] += position * sizes[placement.dim]
                index = index * count + position
            elif type(placement) is not Replicate:
                raise UserError(
                    f"{name} {tuple(leaf.shape)} is placed {placement} over {count} ranks: checkpoints hold tensors "
                    "that are replicated or evenly sharded"
                )
    return LocalShard(tuple(offsets), tuple(sizes), index)


def gather_shard_checksums(
    group: ControlGroup, shards: Mapping[str, LocalShard], tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return every rank's (shard index, checksum) of every leaf, (ranks, leaves, 2) on the CPU. Collective call."""
    checksums = [checksum(tensor, shards[name].offsets) for name, tensor in tensors.items()]
    on_cpu = torch.stack(checksums).cpu() if checksums else torch.empty(0, dtype=torch.int64)  # one transfer
    indices = torch.tensor([shards[name].index for name in tensors], dtype=torch.int64)
    return torch.stack(distributed.all_gather_object(torch.stack([indices, on_cpu], dim=-1), group=group))


def full_fingerprints(shard_checksums: Tensor, names: list[str]) -> dict[str, str]:
    """Return the hexadecimal checksum of each full leaf; copies of a shard count once and must be equal."""
    fingerprints = {}
    for i, name in enumerate(names):
        distinct: dict[int, tuple[int, int]] = {}
        for rank, (index, value) in enumerate(shard_checksums[:, i].tolist()):
            first_rank, first_value = distinct.setdefault(index, (rank, value))
            if value != first_value:
                raise UserError(f"{name} differs between rank {first_rank} and rank {rank}: it should be equal on both")
        fingerprints[name] = f"{sum(value for _, value in distinct.values()) % 2**64:016x}"
    return fingerprints


def shards_to_write(shard_checksums: Tensor, rank: int) -> list[bool]:
    """Return for every leaf whether `rank` writes its shard: ranks with copies of a shard take turns over leaves."""
    writes = []
    for i in range(shard_checksums.shape[1]):
        indices = shard_checksums[:, i, 0]
        holders = (indices == indices[rank]).nonzero().flatten().tolist()
        writes.append(holders[i % len(holders)] == rank)
    return writes


# The header


def build_header(
    step: int, meta: Mapping[str, Any], state: Specs, arrays: Specs, contents: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return the item `meta`, as JSON will return it; `state` with fingerprints, `arrays` from `array_specs`."""
    files = {name: {"sha256": _sha256(content)} for name, content in contents.items()}
    header = {"format": FORMAT, "step": step, "meta": meta, "state": state, "arrays": arrays, "files": files}
    return _with_checksum(header)


def tensor_spec(value: Tensor | np.ndarray) -> dict[str, Any]:
    """Return {"shape", "dtype"} as JSON values."""
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def array_specs(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    return {name: {**tensor_spec(array), "sha256": _sha256(array.tobytes())} for name, array in arrays.items()}


def read_header(path: Path) -> dict[str, Any]:
    """Read what `build_header` returned for the step at `path`."""
    file = path / "meta" / "metadata"
    try:
        header = json.loads(file.read_text("utf-8"))
        version, is_intact = header["format"], header == _with_checksum(header)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise corruption_error(path, f"{file} cannot be read ({reason(error)})") from error
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"checkpoint {path} has format {version}, this nanochat reads {FORMAT}: update nanochat")
    if version != FORMAT or not is_intact:
        raise corruption_error(path, f"{file} has changed since it was written")
    right = path.with_name(str(header.get("step", path.name)))
    if right != path:
        raise UserError(f"{path} was renamed or copied: it holds step {right.name}; rename it to {right}, or delete it")
    return header


def _with_checksum(header: Mapping[str, Any]) -> dict[str, Any]:
    values = json.loads(json.dumps({name: value for name, value in header.items() if name != "sha256"}))
    return {**values, "sha256": _sha256(json.dumps(values, sort_keys=True).encode())}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compare_specs(path: Path, saved: Specs, expected: Specs) -> None:
    """Check names, shapes and dtypes of the leaves saved at `path`; the error names the first three differences."""

    def show(leaf: Mapping[str, Any]) -> str:
        return f"({', '.join(map(str, leaf['shape']))}) {leaf.get('dtype', '')}".rstrip()

    differences = []
    for name in {**expected, **saved}:
        if name not in saved:
            differences.append(f"has no {name}, this model expects {show(expected[name])}")
        elif name not in expected:
            differences.append(f"has {name} {show(saved[name])}, which this model does not have")
        elif show(saved[name]) != show(expected[name]):
            differences.append(f"has {name} {show(saved[name])}, this model expects {show(expected[name])}")
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise UserError(f"checkpoint {path} {'; it '.join(differences[:3])}{more}")


# Reading and verifying


def read_leaves(
    path: Path,
    saved: Specs,
    device: torch.device | str,
    like: Mapping[str, Tensor] | None = None,
    group: ControlGroup = ControlGroup(),
) -> dict[str, Tensor]:
    """Read leaves of the state to `device` and verify them there; return {name: this process's shard}.

    Args:
        like: tensors of these shapes whose placements say which shard of each leaf to read; None: full leaves.
        group: the ranks that read together and between them read every shard. Collective call.
    """
    with raise_on_any_failure(group):
        shards = {name: local_shard(like[name], name) if like else _full_shard(spec) for name, spec in saved.items()}
        arrays = _read_item(path / "state", saved, shards)
        tensors = {name: storage.to_tensor(arrays.pop(name)).to(device) for name in saved}
    shard_checksums = gather_shard_checksums(group, shards, tensors)
    # All ranks find the same damage, but another node may see another list of steps to suggest instead.
    with raise_on_any_failure(group):
        try:
            fingerprints = full_fingerprints(shard_checksums, list(saved))
        except UserError as error:
            raise corruption_error(path, f"ranks read different bytes from {path / 'state'} ({error})") from error
        for name, leaf in saved.items():
            if fingerprints[name] != leaf["fingerprint"]:
                raise corruption_error(path, f"{name} is corrupt: bytes in {path / 'state'} have changed")
    return tensors


def read_arrays(path: Path, saved: Specs) -> dict[str, np.ndarray]:
    arrays = _read_item(path / "arrays", saved, {name: _full_shard(spec) for name, spec in saved.items()})
    for name, array in saved.items():
        if _sha256(arrays[name].tobytes()) != array["sha256"]:
            raise corruption_error(path, f"{name} is corrupt: bytes in {path / 'arrays'} have changed")
    return arrays


def _full_shard(spec: Mapping[str, Any]) -> LocalShard:
    return LocalShard((0,) * len(spec["shape"]), tuple(spec["shape"]))


def _read_item(item: Path, saved: Specs, shards: Mapping[str, LocalShard]) -> dict[str, np.ndarray]:
    stored, arrays = {}, {}
    for name, spec in saved.items():
        offsets, sizes, _ = shards[name]
        if math.prod(spec["shape"]):
            index = tuple(slice(start, start + size) for start, size in zip(offsets, sizes))
            stored[name] = (spec["shape"], index)
        else:  # orbax stores no empty arrays
            arrays[name] = np.empty(sizes, np.dtype(spec["dtype"]))
    try:
        arrays |= storage.read_blocks(item, stored)
    except MemoryError:
        raise
    except Exception as error:  # tensorstore raises whatever the damage leads it to
        raise corruption_error(item.parent, f"{item} cannot be read ({reason(error)})") from error
    for name, spec in saved.items():
        expected = {"shape": [*shards[name].sizes], "dtype": spec["dtype"]}
        if name not in arrays or tensor_spec(arrays[name]) != expected:
            raise corruption_error(item.parent, f"{name} in {item} is missing or has another shape or dtype than saved")
    return {name: arrays[name] for name in saved}


def check_files(path: Path, saved: Specs) -> dict[str, Path]:
    """Verify files and return {name: path}."""
    files = {name: path / "files" / name for name in saved}
    for name, file in files.items():
        if not file.is_file() or _sha256(file.read_bytes()) != saved[name]["sha256"]:
            raise corruption_error(path, f"{file} is missing or corrupt")
    return files


def matches_saved(path: Path, header: Mapping[str, Any], state: Mapping[str, Tensor], group: ControlGroup) -> bool:
    """Return whether the step at `path` is intact; UserError if it was saved with other values than rank 0's `header`.

    Collective call: every rank reads the shards of `state` that it holds.
    """
    try:
        with raise_on_any_failure(group):
            if group.rank == 0:
                saved = read_header(path)
                for item in ("state", "arrays", "files"):
                    for name in {**saved[item], **header[item]}:
                        if saved[item].get(name) != header[item].get(name):
                            raise UserError(
                                f"checkpoint {path} exists with another {name}: delete it, or save to another folder"
                            )
                read_arrays(path, saved["arrays"])
                check_files(path, saved["files"])
        read_leaves(path, header["state"], "cpu", state, group)
    except CorruptCheckpointError:
        return False
    return True


# Error messages


def corruption_error(path: Path, problem: str) -> CorruptCheckpointError:
    """Return the error about the step at `path`, with the step to resume from instead."""
    others = [step for step in storage.steps(path.parent) if step != int(path.name)]
    good = max([step for step in others if step < int(path.name)] or others, default=None)
    fix = "there is no other step" if good is None else f"step {good} exists too: delete {path} to resume from it"
    return CorruptCheckpointError(f"checkpoint {path}: {problem}; {fix}")


def reason(error: BaseException) -> str:
    """Return why an error happened; tensorstore's messages read `CODE: what: what: why [details]`."""
    why = text.reason(error)
    if isinstance(error, UserError | OSError):
        return why
    why = why.split(" [")[0].rsplit(": ", 1)[-1][:200]
    return why if isinstance(error, ValueError) else f"{type(error).__name__} {why}"
