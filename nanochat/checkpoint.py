"""Checkpoints: atomic, asynchronous, sharded, and verified leaf by leaf when they are read.

A checkpoint is the folder `<folder>/<step>`, written by orbax, with these items:
    state/    every leaf of the train state, a PyTree that plain JAX and orbax read
    arrays/   further arrays that are equal on every rank (the loader's buffer), a PyTree as well
    meta/     JSON: the caller's values, and shape, dtype and checksum of everything beside it
    files/    small files, copied in as they are (the tokenizer's)
    metrics/  JSON: the numbers that `keep_best` goes by

orbax writes into a temporary folder and renames it, so a step that is listed is complete; a step that has to go is
renamed before its files are removed. What orbax and the disk do not notice (a flipped byte, an exchanged leaf,
another shape or dtype, a leaf that is not there) is found here and ends in one `UserError`.

In a job of several processes all of them call these functions at the same points, with a folder that all of them
see. Each writes and reads its own part of the state; rank 0 alone makes, completes and deletes steps. They decide
together, and what fails on one rank is raised on all. How a state was sharded when it was saved does not matter to
how it is read.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from nanochat import commit, manifest, retention, shards, store, tree
from nanochat import ranks as jobs
from nanochat.commit import Writer
from nanochat.config import UserError
from nanochat.ranks import Ranks, together
from nanochat.retention import CheckpointConfig as CheckpointConfig  # a part of what this module offers
from nanochat.shards import Part

LEAF_DTYPES = ("float32", "bfloat16", "float16", "int32", "int64", "uint8", "bool")

State = TypeVar("State", bound=tuple)


@dataclasses.dataclass
class Manager:
    """An open checkpoint folder: the ranks that have it open, what writes, and the save in the background if any."""

    folder: Path
    config: CheckpointConfig
    ranks: Ranks
    writer: Writer
    saving: Future[None] | None = None


def open(folder: Path, config: CheckpointConfig = CheckpointConfig()) -> Manager:
    """Open `folder` for saving, make it if need be, and clear away what a killed save left there.

    One job at a time may have a folder open; `restore`, `load_params` and the rest may read it meanwhile.

    Raises:
        UserError: the folder cannot be made or read, or a setting makes no sense.
    """
    for name in ("every_steps", "keep_last", "keep_every_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"checkpoint {name}={value}: expected a number above 0, or none")
    folder = _folder(folder)
    ranks, writer = jobs.join(), Writer(folder, config, jobs.join())
    with together(ranks):
        if ranks.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"checkpoint folder {folder} cannot be made: {manifest.reason(error)}") from error
            commit.open_orbax(writer)
    return Manager(folder, config, ranks, writer)


def save(
    manager: Manager,
    state: Any,
    meta: Mapping[str, Any],
    *,
    arrays: Mapping[str, np.ndarray | Tensor] | None = None,
    files: Mapping[str, Path] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Save `state` as step `int(state.step)`; whatever happens meanwhile, earlier steps stay whole.

    Each rank copies what it is to write before this returns, so the caller may change its buffers in place at once.
    What goes wrong in the background is raised by the next `save`, `wait` or `close`.

    A step that exists is left as it is if it is sound and holds the same state, arrays and files (`metrics` are added
    if it has none), and is replaced if it is damaged. When the disk is short of room, steps that this save would
    delete afterwards are deleted before it, as long as another one remains and that helps; else nothing is deleted.

    Args:
        state: NamedTuple of tensors and nested TensorDicts; its field `step` is a 0-d integer tensor. A leaf is a
            plain tensor, equal on every rank, or a DTensor with even shards.
        meta: JSON values; given back as JSON gives them back (tuples become lists, keys strings). Rank 0's are saved.
        arrays: numeric arrays of any shape, equal on every rank; a dot in a name nests it.
        files: name in the checkpoint → file to copy; rank 0 reads it.
        metrics: of this step; `val/bpb` decides which step is the best.

    Raises:
        UserError: the disk is full or not writable, this step exists with other values, ranks differ in what should be
            equal on all of them, or an earlier save failed.
    """
    wait(manager)
    ranks, folder = manager.ranks, manager.folder
    with together(ranks):
        leaves = _leaves(state)
        parts = {name: shards.part(leaf, name) for name, leaf in leaves.items()}
        specs = {name: manifest.spec(leaf) for name, leaf in leaves.items()}
        buffers = {n: store.to_numpy(a) if isinstance(a, Tensor) else np.array(a) for n, a in (arrays or {}).items()}
        described = manifest.describe_arrays(buffers)
    _require_same(ranks, {**specs, **described})
    survey = shards.survey(ranks, parts, {name: shards.local(leaf) for name, leaf in leaves.items()})
    with together(ranks):
        step, fingerprints = int(state.step), shards.fingerprints(survey, list(leaves))
        specs = {name: {**spec, "fingerprint": fingerprints[name]} for name, spec in specs.items()}
        contents = _read_files(files or {}) if ranks.rank == 0 else {}
        header = manifest.build(step, meta, specs, described, contents)
    exists = _first(ranks, lambda: _has_step(manager, step))
    if exists and manifest.is_sound_copy(folder / str(step), header, leaves, ranks):
        if metrics:
            add_metrics(manager, step, metrics)
        return
    needed_bytes = tree.nbytes(leaves) + sum(a.nbytes for a in buffers.values()) + sum(map(len, contents.values()))
    needed_bytes += needed_bytes // 100 + len(json.dumps(header)) + 2**20  # orbax's indices, and blocks half full
    with together(ranks):
        if ranks.rank == 0:
            if exists:  # and is damaged
                manager.writer.orbax.delete(step)
                store.clear(folder)
            retention.make_room(manager.writer.orbax, folder, manager.config, step, needed_bytes, metrics)
        mine = dict(zip(leaves, shards.written_here(survey, ranks.rank)))
        blocks = {name: _block(leaf, parts[name]) for name, leaf in leaves.items() if mine[name] and leaf.numel()}
    names = [name for name, leaf in leaves.items() if leaf.numel()]
    copy = commit.Step(step, names, blocks, buffers, contents, header, metrics, needed_bytes)
    background = ThreadPoolExecutor(1, "checkpoint")
    manager.saving = background.submit(commit.write, manager.writer, copy)
    background.shutdown(wait=False)  # no second task will come
    if not manager.config.asynchronous:
        wait(manager)


def add_metrics(manager: Manager, step: int, metrics: Mapping[str, float]) -> None:
    """Give a step that was saved before it was evaluated its metrics; one that has some keeps them.

    Raises:
        UserError: they cannot be written.
    """
    wait(manager)
    path = retention.metrics_path(manager.folder, step)
    with together(manager.ranks):
        if manager.ranks.rank == 0 and not path.exists():
            try:
                path.parent.mkdir(exist_ok=True)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(dict(metrics)))
                partial.replace(path)
            except OSError as error:
                raise UserError(f"metrics of step {step}: {path}: {manifest.reason(error)}") from error


def wait(manager: Manager) -> None:
    """Return when nothing is being written any more.

    Raises:
        UserError: the save in the background failed; names the reason and the newest step that is whole.
    """
    if manager.saving is not None:
        try:
            manager.saving.result()
        finally:
            if manager.saving.done():
                manager.saving = None


def close(manager: Manager) -> None:
    """Wait for the save in the background, then let go of the folder; also right on a rank that failed alone.

    Raises:
        UserError: as `wait` does.
    """
    try:
        wait(manager)
    finally:
        if manager.writer.orbax is not None:
            manager.writer.orbax.close()
        jobs.leave(manager.ranks)
        jobs.leave(manager.writer.ranks)


def steps(source: Manager | Path) -> list[int]:
    """Return the complete steps in rising order; of a manager, as rank 0 sees them: every rank asks."""
    return _first(_line(source), lambda: store.steps(_folder(source)))


def latest_step(source: Manager | Path) -> int | None:
    """Return the newest complete step, or None; asked as `steps`."""
    return max(steps(source), default=None)


def best_step(source: Manager | Path) -> int | None:
    """Return the step with the lowest val/bpb (the newest of equals), or None where no step has one."""
    scores = {step: retention.score(metrics) for step, metrics in describe(source).items()}
    scored = [step for step, score in scores.items() if score < math.inf]
    return min(scored, key=lambda step: (scores[step], -step), default=None)


def describe(source: Manager | Path) -> dict[int, dict[str, float]]:
    """Return {step: metrics} of the complete steps; a step that was saved without has none. Asked as `steps`."""
    return dict(_first(_line(source), lambda: list(retention.describe(_folder(source)).items())))


def restore(
    source: Manager | Path,
    abstract_state: State,
    step: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[State, dict[str, Any], dict[str, np.ndarray]]:
    """Read a checkpoint into a new state of `abstract_state`'s structure, each rank its own part.

    Names, shapes and dtypes are compared before anything is read, every leaf's fingerprint when it is on `device`.

    Args:
        source: an open manager (what it is writing is waited for), or a folder, which is only read.
        abstract_state: as given to `save`; only names, shapes, dtypes and placements count, so meta tensors, or
            DTensors over them, will do.
        step: None: the newest.
        device: where the tensors are to be.

    Returns:
        (state, meta, arrays) as they were given to `save`; a leaf that is a DTensor in `abstract_state` is one of the
        same mesh and placements.

    Raises:
        UserError: no such step, or the checkpoint of another model.
        UserError: a byte has changed or is missing (`manifest.DamagedCheckpoint`); names leaf, step, and way out.
    """
    with _talking(source) as ranks:
        path = _locate(source, step, ranks)
        header = _first(ranks, lambda: manifest.read(path))
        with together(ranks):
            like = _leaves(abstract_state)
            manifest.compare(path, header["state"], {name: manifest.spec(leaf) for name, leaf in like.items()})
        parts = manifest.read_leaves(path, header["state"], device, like, ranks)
        with together(ranks):
            arrays = manifest.read_arrays(path, header["arrays"])
    leaves = {name: shards.assemble(part, like[name]) for name, part in parts.items()}
    fields = {name: _rebuild(value, leaves, name) for name, value in _fields(abstract_state).items()}
    return type(abstract_state)(**fields), header["meta"], arrays


def load_params(
    folder: Path, *, step: int | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[TensorDict, dict[str, Any], dict[str, Path]]:
    """Read the parameters alone: not the optimizer's state, and without knowing the model.

    The process that calls this reads them whole, however they were sharded; ranks that call it do not talk about it.

    Args:
        folder: as given to `open`; it is only read.
        step: None: the newest.
        device: where the parameters are to be.
        dtype: cast floating-point leaves to this after their fingerprints are checked; None: as saved.

    Returns:
        (params, meta, {name: path of the file inside the checkpoint}).

    Raises:
        UserError: no such step, or damaged bytes.
    """
    path = _locate(folder, step, Ranks())
    header = manifest.read(path)
    saved = {name: spec for name, spec in header["state"].items() if name.startswith("params.")}
    leaves = manifest.read_leaves(path, saved, device)
    if dtype is not None:
        leaves = {name: x.to(dtype) if x.is_floating_point() else x for name, x in leaves.items()}
    params = tree.unflatten({name.removeprefix("params."): x for name, x in leaves.items()})
    return params, header["meta"], manifest.check_files(path, header["files"])


# What is in a state


def _fields(state: Any) -> dict[str, Any]:
    if not hasattr(state, "_asdict"):
        raise TypeError(f"expected a NamedTuple of tensors and TensorDicts, got {type(state).__name__}")
    return state._asdict()


def _leaves(state: Any) -> dict[str, Tensor]:
    leaves = tree.flatten(_fields(state))
    for name, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} is a {type(leaf).__name__}, not a tensor")
        if manifest.spec(leaf)["dtype"] not in LEAF_DTYPES:
            raise UserError(f"{name} is {manifest.spec(leaf)['dtype']}: checkpoints hold {', '.join(LEAF_DTYPES)}")
    return leaves


def _rebuild(like: Any, leaves: Mapping[str, Tensor], name: str) -> Any:
    if not isinstance(like, TensorDictBase | Mapping):
        return leaves[name]
    fields = {key: _rebuild(value, leaves, f"{name}.{key}") for key, value in like.items()}
    return TensorDict(fields, like.batch_size) if isinstance(like, TensorDictBase) else fields


def _block(leaf: Tensor, part: Part) -> store.Block:
    return store.Block(
        store.to_numpy(shards.local(leaf)), leaf.shape, part.offsets, shards.chunk(part.sizes, leaf.element_size())
    )


def _read_files(files: Mapping[str, Path]) -> dict[str, bytes]:
    try:
        return {name: Path(path).read_bytes() for name, path in files.items()}
    except OSError as error:
        what = f"{error.filename} belongs into the checkpoint and cannot be read"
        raise UserError(f"{what} ({error.strerror})") from error


# Where it lies, and who says so


def _folder(source: Manager | Path) -> Path:
    return source.folder if isinstance(source, Manager) else Path(source).absolute()


def _line(source: Manager | Path) -> Ranks:
    return source.ranks if isinstance(source, Manager) else Ranks()


@contextlib.contextmanager
def _talking(source: Manager | Path) -> Iterator[Ranks]:
    """Give the manager's ranks, or all ranks of the job for as long as a folder is read."""
    if isinstance(source, Manager):
        wait(source)
        yield source.ranks
        return
    ranks = jobs.join()
    try:
        yield ranks
    finally:
        jobs.leave(ranks)


def _first(ranks: Ranks, ask: Callable[[], Any]) -> Any:
    """Return on every rank what rank 0 gets when it asks."""
    with together(ranks):
        answer = ask() if ranks.rank == 0 else None
    return jobs.tell(ranks, answer)


def _require_same(ranks: Ranks, described: Mapping[str, Any]) -> None:
    first = jobs.tell(ranks, described)
    with together(ranks):
        for name in {**first, **described}:
            if first.get(name) != described.get(name):
                raise UserError(f"{name} differs between rank 0 and rank {ranks.rank}, which should hold the same")


def _has_step(manager: Manager, step: int) -> bool:
    manager.writer.orbax.reload()  # a step may have been deleted by hand, or given metrics
    return step in manager.writer.orbax.all_steps()


def _locate(source: Manager | Path, step: int | None, ranks: Ranks) -> Path:
    folder, there = _folder(source), _first(ranks, lambda: store.steps(_folder(source)))
    if not there:
        raise UserError(f"no checkpoint in {folder}")
    if step is not None and step not in there:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are steps {', '.join(map(str, there))}")
    return folder / str(there[-1] if step is None else step)
