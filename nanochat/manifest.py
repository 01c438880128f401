"""What a checkpoint says about itself, in its item `meta`, and whether the rest of it is true to that.

orbax and the disk do not notice a flipped byte, exchanged leaves, another shape or dtype, a leaf that is not there.
Everything read here is held against the shapes, dtypes and checksums that were noted down when the step was saved.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat import ranks as jobs
from nanochat import shards, store
from nanochat.config import UserError
from nanochat.ranks import Ranks, together
from nanochat.shards import Part

FORMAT = 1

Specs = Mapping[str, Mapping[str, Any]]  # name → shape, dtype and checksum, as JSON


class DamagedCheckpoint(UserError):
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
    return _seal(
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
        if array.dtype.kind not in "biuf" and array.dtype != store.numpy_dtype("bfloat16"):
            raise UserError(f"array {name} is {array.dtype}: checkpoints hold numbers")
    return {name: {**spec(array), "sha256": _sha256(array.tobytes())} for name, array in arrays.items()}


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
        raise damaged(path, f"{file} cannot be read ({reason(error)})") from error
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"checkpoint {path} has format {version}, this nanochat reads {FORMAT}: update nanochat")
    if version != FORMAT or header != _seal(header):
        raise damaged(path, f"{file} is not as it was written")
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
    ranks: Ranks = Ranks(),
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
    with together(ranks):
        whole = {name: torch.empty(leaf["shape"], device="meta") for name, leaf in saved.items()}
        parts = {name: shards.part((like or whole)[name], name) for name in saved}
        found = _read_item(path / "state", saved, parts)
        tensors = {name: store.to_tensor(found.pop(name)).to(device) for name in saved}
    survey = shards.survey(ranks, parts, tensors)
    with together(ranks):  # all ranks see the same; the way out, by the disk, may look different from another node
        try:
            found = shards.fingerprints(survey, list(saved))
        except UserError as error:
            raise damaged(path, f"{error}: they read {path / 'state'} differently") from error
        for name, leaf in saved.items():
            if found[name] != leaf["fingerprint"]:
                raise damaged(path, f"{name} is damaged: bytes in {path / 'state'} have changed")
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
            raise damaged(path, f"{name} is damaged: bytes in {path / 'arrays'} have changed")
    return found


def _read_item(item: Path, saved: Specs, parts: Mapping[str, Part]) -> dict[str, np.ndarray]:
    wanted = {n: (array["shape"], parts[n].slices) for n, array in saved.items() if math.prod(array["shape"])}
    try:
        found = store.read_blocks(item, wanted)
    except MemoryError:
        raise
    except Exception as error:  # tensorstore raises whatever the damage leads it to
        raise damaged(item.parent, f"{item} cannot be read ({reason(error)})") from error
    arrays = {}
    for name, array in saved.items():
        if not math.prod(array["shape"]):  # orbax stores no empty arrays
            found[name] = np.empty(parts[name].sizes, store.numpy_dtype(array["dtype"]))
        arrays[name] = found.pop(name, None)
        if arrays[name] is None or spec(arrays[name]) != {"shape": [*parts[name].sizes], "dtype": array["dtype"]}:
            raise damaged(item.parent, f"{name} in {item} is missing or of another shape or dtype than was saved")
    return arrays


def check_files(path: Path, saved: Specs) -> dict[str, Path]:
    """Verify these files and return {name: where it lies}.

    Raises:
        DamagedCheckpoint: names the file.
    """
    files = {name: path / "files" / name for name in saved}
    for name, file in files.items():
        if not file.is_file() or _sha256(file.read_bytes()) != saved[name]["sha256"]:
            raise damaged(path, f"{file} is missing or damaged")
    return files


def is_sound_copy(path: Path, header: Mapping[str, Any], state: Mapping[str, Tensor], ranks: Ranks) -> bool:
    """Return True if the checkpoint at `path` is what `header` describes, byte for byte; False if it is damaged.

    Args:
        header: rank 0's counts.
        state: the leaves, of which every rank reads the part that it holds.

    Raises:
        UserError: it is sound or not, but of other values.
    """
    try:
        with together(ranks):
            saved = _read_copy(path, header) if ranks.rank == 0 else {}
        saved = jobs.tell(ranks, saved)
        read_leaves(path, saved["state"], "cpu", state, ranks)
        with together(ranks):
            read_arrays(path, saved["arrays"] if ranks.rank == 0 else {})
            check_files(path, saved["files"] if ranks.rank == 0 else {})
    except DamagedCheckpoint:
        return False
    return True


def _read_copy(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    saved = read(path)
    for item in ("state", "arrays", "files"):
        for name in {**saved[item], **header[item]}:
            if saved[item].get(name) != header[item].get(name):
                raise UserError(f"checkpoint {path} exists with another {name}: delete it, or save to another folder")
    return saved


def spec(value: Tensor | np.ndarray) -> dict[str, Any]:
    """Return shape and dtype as JSON."""
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def damaged(path: Path, problem: str) -> DamagedCheckpoint:
    """Return the error about the checkpoint at `path`, with the step to go on from instead."""
    others = [step for step in store.steps(path.parent) if step != int(path.name)]
    good = max([step for step in others if step < int(path.name)] or others, default=None)
    way_out = f"step {good} is there too: delete {path} to go on from it"
    return DamagedCheckpoint(f"checkpoint {path}: {problem}; {'no other step is there' if good is None else way_out}")


def reason(error: BaseException) -> str:
    """Return the part of an error's message that says why; tensorstore nests `CODE: what: what: why [details]`."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).split(" [")[0].strip().splitlines()
    why = lines[0].rsplit(": ", 1)[-1][:200] if lines else ""
    return why if isinstance(error, ValueError) else f"{type(error).__name__} {why}".rstrip()


def _seal(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header as JSON will give it back, with a checksum over the rest of it."""
    sealed = json.loads(json.dumps({name: value for name, value in header.items() if name != "sha256"}))
    return {**sealed, "sha256": _sha256(json.dumps(sealed, sort_keys=True).encode())}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
