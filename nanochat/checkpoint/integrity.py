"""What a checkpoint says about itself, in its item `meta`, and whether the rest of it is true to that.

orbax and the disk do not notice a flipped byte, exchanged leaves, another shape or dtype, a leaf that is not there.
Everything read here is held against the shapes, dtypes and checksums that were noted down when the step was saved.

A checksum of a tensor that is computed where the tensor lies and adds up over its shards.

Which part of a sharded tensor lies in this process, and one checksum per tensor over all processes.

A leaf is a plain tensor, equal on every rank, or a DTensor with even shards. What several ranks hold a copy of is
written by one of them, taken in turns over the leaves, and counts once in the checksum.
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

from nanochat import distributed
from nanochat.checkpoint import storage
from nanochat.config import UserError
from nanochat.distributed import ControlGroup, raise_on_any_failure


def fingerprint(shard: Tensor, offsets: Sequence[int] | None = None) -> int:
    """Return a 64-bit checksum of a tensor's bits and their positions; the values of its shards add up to the whole's.

        Σ bits(x[i, j, …]) · w₀[i] · w₁[j] · …   modulo 2**64,  with odd pseudo-random weights per dimension.

    A change of one element always shows (an odd multiple of less than 2**32 is not 0 modulo 2**64); exchanged
    elements, rows or leaves do, but for a chance of about 2**-32. Runs on the tensor's device in bounded memory.

    Args:
        shard: any dtype of 1, 2, 4 or 8 bytes; the tensor, or a block of it.
        offsets: where the block begins in the whole tensor, per dimension; None: at 0.

    Returns:
        An integer in [0, 2**64). For shards: sum(fingerprint(s, o) for s, o in …) % 2**64.
    """
    return int(checksum(shard, offsets)) % 2**64


def checksum(shard: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
    """Return `fingerprint`, modulo 2**64, as a 0-d int64 tensor on the shard's device: nothing waits for the device."""
    bits = shard.detach()
    begin = list(offsets) if offsets is not None else [0] * bits.ndim
    if bits.ndim == 0:
        bits, begin = bits.reshape(1), [0]
    if bits.element_size() == 8:  # as halves: an element's difference must stay below 2**32
        bits = bits.contiguous().view(torch.int32)
        begin[-1] *= 2
    else:
        bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[bits.element_size()])
    # Large enough to amortise the launches, small enough for the cache (CPU) and for bounded memory (GPU).
    chunk_elements = min(2**24 if bits.is_cuda else 2**19, bits.numel())
    # One buffer for all chunks: the first touch of fresh memory costs more than the sums.
    scratch = torch.empty(chunk_elements, dtype=torch.int64, device=bits.device)
    return _weighted_sum(bits, begin, scratch)


def _weighted_sum(bits: Tensor, begin: list[int], scratch: Tensor) -> Tensor:
    if bits.numel() > scratch.numel():
        dim = next(d for d, n in enumerate(bits.shape) if n > 1)
        half = bits.shape[dim] // 2
        middle = [b + half if d == dim else b for d, b in enumerate(begin)]
        first = _weighted_sum(bits.narrow(dim, 0, half), begin, scratch)
        return first + _weighted_sum(bits.narrow(dim, half, bits.shape[dim] - half), middle, scratch)
    total = scratch[: bits.numel()].view(bits.shape).copy_(bits)
    for dim in reversed(range(bits.ndim)):
        total = total.mul_(_odd_weights(dim, begin[dim], bits.shape[dim], bits.device)).sum(-1)
    return total


def _odd_weights(dim: int, begin: int, count: int, device: torch.device) -> Tensor:
    # The mixing steps of splitmix64 (Steele, Lea, Flood 2014), in int64 that wraps; `& mask` makes >> a logical shift.
    x = torch.arange(begin + 1, begin + 1 + count, dtype=torch.int64, device=device)
    x = (x + (dim << 40)) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 31) & (2**33 - 1))) | 1


class Part(NamedTuple):
    """A block of a tensor: where it begins and how large it is, per dimension; `number` counts the tensor's blocks."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    number: int = 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the block in the whole tensor."""
        return tuple(slice(begin, begin + size) for begin, size in zip(self.offsets, self.sizes))


def local_part(leaf: Tensor, name: str = "tensor") -> Part:
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


def local_values(leaf: Tensor) -> Tensor:
    """Return this process's part of `leaf` as a plain tensor over the same memory."""
    return (leaf.to_local() if isinstance(leaf, DTensor) else leaf).detach()


def assemble(here: Tensor, like: Tensor) -> Tensor:
    """Return the tensor that is sharded as `like` and whose local part is `here`."""
    if not isinstance(like, DTensor):
        return here
    return DTensor.from_local(
        here, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gather_part_indices(ranks: ControlGroup, parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return (ranks, leaves, 2): the number of every rank's part of every leaf, and its checksum; equal on all ranks.

    The checksums are computed where the tensors lie, and cross to the host in one transfer.
    """
    sums = [checksum(tensor, parts[name].offsets) for name, tensor in tensors.items()]
    host = torch.stack(sums).cpu() if sums else torch.empty(0, dtype=torch.int64)
    numbers = torch.tensor([parts[name].number for name in tensors], dtype=torch.int64)
    return distributed.all_gather_ints(ranks, torch.stack([numbers, host], dim=-1))


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


def parts_to_write(found: Tensor, rank: int) -> list[bool]:
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


FORMAT = 1

Specs = Mapping[str, Mapping[str, Any]]  # name → shape, dtype and checksum, as JSON


class CorruptCheckpointError(UserError):
    """A checkpoint whose bytes cannot be read or are not those that were saved."""


def build(
    step: int,
    meta: Mapping[str, Any],
    leaves: Specs,
    arrays: Specs,
    files: Mapping[str, bytes],
) -> dict[str, Any]:
    """Return the item `meta` of a checkpoint of these things, as JSON will give it back.

    Args:
        leaves: the whole leaves of the state, with their fingerprints.
        arrays: as `describe_arrays` gives them.

    Raises:
        UserError: a file's name has folders in it.
    """
    for name in files:
        if Path(name).name != name:
            raise UserError(f"file {name}: expected a name without folders")
    return _with_checksum(
        {
            "format": FORMAT,
            "step": step,
            "meta": dict(meta),
            "state": dict(leaves),
            "arrays": dict(arrays),
            "files": {name: {"sha256": _sha256(content)} for name, content in files.items()},
        }
    )


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and checksum of each array.

    Raises:
        UserError: one holds something else than numbers.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" and array.dtype != storage.numpy_dtype("bfloat16"):
            raise UserError(f"array {name} is {array.dtype}: checkpoints hold numbers")
    return {name: {**tensor_spec(array), "sha256": _sha256(array.tobytes())} for name, array in arrays.items()}


def read(path: Path) -> dict[str, Any]:
    """Read what `build` gave for the checkpoint at `path`.

    Raises:
        DamagedCheckpoint: it is not as it was written.
        UserError: a newer nanochat wrote it.
    """
    file = path / "meta" / "metadata"
    try:
        header = json.loads(file.read_text())
        version = header["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise corruption_error(path, f"{file} cannot be read ({reason(error)})") from error
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"checkpoint {path} has format {version}, this nanochat reads {FORMAT}: update nanochat")
    if version != FORMAT or header != _with_checksum(header):
        raise corruption_error(path, f"{file} is not as it was written")
    return header


def compare(path: Path, saved: Specs, wanted: Specs) -> None:
    """Check that the leaves saved at `path` are those wanted, by name, shape and dtype.

    Raises:
        UserError: names the first three differences.
    """

    def show(leaf: Mapping[str, Any]) -> str:
        return f"({', '.join(map(str, leaf['shape']))}) {leaf['dtype']}"

    differences = []
    for name in {**wanted, **saved}:
        if name not in saved:
            differences.append(f"has no {name}, this model wants {show(wanted[name])}")
        elif name not in wanted:
            differences.append(f"has {name} {show(saved[name])}, which this model lacks")
        elif show(saved[name]) != show(wanted[name]):
            differences.append(f"has {name} {show(saved[name])}, this model wants {show(wanted[name])}")
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise UserError(f"checkpoint {path} {'; it '.join(differences[:3])}{more}")


def read_leaves(
    path: Path,
    saved: Specs,
    device: torch.device | str,
    like: Mapping[str, Tensor] | None = None,
    ranks: ControlGroup = ControlGroup(),
) -> dict[str, Tensor]:
    """Read these leaves of the state to `device`, and verify them there.

    Args:
        like: by name, tensors of these shapes that say which part of each leaf this process is to have; None: all.
        ranks: those that read together, which between them have all parts; every one of them calls this.

    Returns:
        {name: this process's part}.

    Raises:
        DamagedCheckpoint: names the leaf; on all ranks.
    """
    with raise_on_any_failure(ranks):
        whole = {name: torch.empty(leaf["shape"], device="meta") for name, leaf in saved.items()}
        parts = {name: local_part((like or whole)[name], name) for name in saved}
        found = _read_item(path / "state", saved, parts)
        tensors = {name: storage.to_tensor(found.pop(name)).to(device) for name in saved}
    survey = gather_part_indices(ranks, parts, tensors)
    with raise_on_any_failure(
        ranks
    ):  # all ranks see the same; the way out, by the disk, may look different from another node
        try:
            found = fingerprints(survey, list(saved))
        except UserError as error:
            raise corruption_error(path, f"{error}: they read {path / 'state'} differently") from error
        for name, leaf in saved.items():
            if found[name] != leaf["fingerprint"]:
                raise corruption_error(path, f"{name} is damaged: bytes in {path / 'state'} have changed")
    return tensors


def read_arrays(path: Path, saved: Specs) -> dict[str, np.ndarray]:
    """Read and verify these arrays.

    Raises:
        DamagedCheckpoint: names the array.
    """
    whole = {name: Part((0,) * len(array["shape"]), tuple(array["shape"])) for name, array in saved.items()}
    found = _read_item(path / "arrays", saved, whole)
    for name, array in saved.items():
        if _sha256(found[name].tobytes()) != array["sha256"]:
            raise corruption_error(path, f"{name} is damaged: bytes in {path / 'arrays'} have changed")
    return found


def _read_item(item: Path, saved: Specs, parts: Mapping[str, Part]) -> dict[str, np.ndarray]:
    wanted = {n: (array["shape"], parts[n].slices) for n, array in saved.items() if math.prod(array["shape"])}
    try:
        found = storage.read_blocks(item, wanted)
    except MemoryError:
        raise
    except Exception as error:  # tensorstore raises whatever the damage leads it to
        raise corruption_error(item.parent, f"{item} cannot be read ({reason(error)})") from error
    arrays = {}
    for name, array in saved.items():
        if not math.prod(array["shape"]):  # orbax stores no empty arrays
            found[name] = np.empty(parts[name].sizes, storage.numpy_dtype(array["dtype"]))
        arrays[name] = found.pop(name, None)
        if arrays[name] is None or tensor_spec(arrays[name]) != {
            "shape": [*parts[name].sizes],
            "dtype": array["dtype"],
        }:
            raise corruption_error(
                item.parent, f"{name} in {item} is missing or of another shape or dtype than was saved"
            )
    return arrays


def check_files(path: Path, saved: Specs) -> dict[str, Path]:
    """Verify these files and return {name: where it lies}.

    Raises:
        DamagedCheckpoint: names the file.
    """
    files = {name: path / "files" / name for name in saved}
    for name, file in files.items():
        if not file.is_file() or _sha256(file.read_bytes()) != saved[name]["sha256"]:
            raise corruption_error(path, f"{file} is missing or damaged")
    return files


def matches_saved(path: Path, header: Mapping[str, Any], state: Mapping[str, Tensor], ranks: ControlGroup) -> bool:
    """Return True if the checkpoint at `path` is what `header` describes, byte for byte; False if it is damaged.

    Args:
        header: rank 0's counts.
        state: the leaves, of which every rank reads the part that it holds.

    Raises:
        UserError: it is sound or not, but of other values.
    """
    try:
        with raise_on_any_failure(ranks):
            saved = _read_copy(path, header) if ranks.rank == 0 else {}
        saved = distributed.broadcast_object(ranks, saved)
        read_leaves(path, saved["state"], "cpu", state, ranks)
        with raise_on_any_failure(ranks):
            read_arrays(path, saved["arrays"] if ranks.rank == 0 else {})
            check_files(path, saved["files"] if ranks.rank == 0 else {})
    except CorruptCheckpointError:
        return False
    return True


def _read_copy(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    saved = read(path)
    for item in ("state", "arrays", "files"):
        for name in {**saved[item], **header[item]}:
            if saved[item].get(name) != header[item].get(name):
                raise UserError(f"checkpoint {path} exists with another {name}: delete it, or save to another folder")
    return saved


def tensor_spec(value: Tensor | np.ndarray) -> dict[str, Any]:
    """Return shape and dtype as JSON."""
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def corruption_error(path: Path, problem: str) -> CorruptCheckpointError:
    """Return the error about the checkpoint at `path`, with the step to go on from instead."""
    others = [step for step in storage.steps(path.parent) if step != int(path.name)]
    good = max([step for step in others if step < int(path.name)] or others, default=None)
    way_out = f"step {good} is there too: delete {path} to go on from it"
    return CorruptCheckpointError(
        f"checkpoint {path}: {problem}; {'no other step is there' if good is None else way_out}"
    )


def reason(error: BaseException) -> str:
    """Return the part of an error's message that says why; tensorstore nests `CODE: what: what: why [details]`."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).split(" [")[0].strip().splitlines()
    why = lines[0].rsplit(": ", 1)[-1][:200] if lines else ""
    return why if isinstance(error, ValueError) else f"{type(error).__name__} {why}".rstrip()


def _with_checksum(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header as JSON will give it back, with a checksum over the rest of it."""
    sealed = json.loads(json.dumps({name: value for name, value in header.items() if name != "sha256"}))
    return {**sealed, "sha256": _sha256(json.dumps(sealed, sort_keys=True).encode())}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
