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

Which checkpoints stay: the policy that orbax goes by after each save, and what it may do for want of room.

One step on its way to the disk: each rank writes its blocks in the background, and rank 0 lets orbax complete it.

All ranks learn how it ended, whoever failed, without a word between the threads that train: a rank that has left the
training loop by an exception can still finish its part, and nobody waits for it there.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from nanochat import distributed, tree
from nanochat.checkpoint import integrity, storage
from nanochat.checkpoint.integrity import Part
from nanochat.checkpoint.storage import Block
from nanochat.config import UserError
from nanochat.distributed import ControlGroup, LostRankError, raise_on_any_failure

BEST_METRIC = "val/bpb"  # the lower the better


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which ones stay.

    Attributes:
        every_steps: for the training loop: save whenever that many steps are done; None: at the end and on signals.
        keep_last: this many of the newest steps stay; None: all.
        keep_best: the step with the lowest `val/bpb` stays beside them.
        keep_every_steps: steps divisible by this number stay for good.
        asynchronous: write in the background; `save` returns as soon as it holds a copy of the state.
    """

    every_steps: int | None = None
    keep_last: int | None = 2
    keep_best: bool = True
    keep_every_steps: int | None = None
    asynchronous: bool = True


def preservation_policy(config: CheckpointConfig) -> Any:
    """Return orbax's PreservationPolicy of these settings."""
    policies = storage.orbax().checkpoint_managers
    stays = [policies.LatestN(config.keep_last)]
    if config.keep_best:
        best = policies.BestN(get_metric_fn=best_score, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        stays.append(best)
    if config.keep_every_steps is not None:
        stays.append(policies.EveryNSteps(config.keep_every_steps))
    return policies.AnyPreservationPolicy(stays)


def best_score(metrics: Mapping[str, float]) -> float:
    """Return what a step with these metrics is compared by; infinite where they say nothing."""
    value = metrics.get(BEST_METRIC, math.inf)
    return value if math.isfinite(value) else math.inf


def metrics_path(folder: Path, step: int) -> Path:
    """Return where the metrics of a step are, which is where CheckpointManager keeps them."""
    return folder / str(step) / "metrics" / "metrics"


def saved_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Return {step: metrics} of the complete steps in `folder`; a step that was saved without has none.

    Raises:
        DamagedCheckpoint: a metrics file cannot be read.
    """
    found = {}
    for step in storage.steps(folder):
        path = metrics_path(folder, step)
        try:
            found[step] = dict(json.loads(path.read_text())) if path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise integrity.corruption_error(
                folder / str(step), f"{path} cannot be read ({integrity.reason(error)})"
            ) from error
    return found


def make_room(
    orbax: Any,
    folder: Path,
    config: CheckpointConfig,
    step: int,
    needed_bytes: int,
    metrics: Mapping[str, float] | None,
) -> None:
    """Fail before writing where the disk is too full, unless steps that are due to go anyway make enough room.

    Args:
        orbax: the CheckpointManager of `folder`, to delete by.
        step, needed_bytes, metrics: of the checkpoint to be written.

    Raises:
        UserError: says how much is missing.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= needed_bytes:
        return
    infos = [
        types.SimpleNamespace(step=s, metrics=m or None) for s, m in {**saved_metrics(folder), step: metrics}.items()
    ]
    stays = preservation_policy(config).should_preserve(infos, context=None)
    latest = max(storage.steps(folder), default=None)
    doomed = [info.step for info, stay in zip(infos, stays) if not (stay or info.step in (step, latest))]
    freed_bytes = sum(p.stat().st_size for s in doomed for p in (folder / str(s)).rglob("*") if p.is_file())
    if free_bytes + freed_bytes < needed_bytes:
        raise UserError(
            f"checkpoint of step {step} needs {needed_bytes / 1e6:.1f} MB, {folder} has {free_bytes / 1e6:.1f} MB "
            f"free: make room or save to another folder; {last_good(folder)}"
        )
    for old in doomed:
        orbax.delete(old)
    storage.clear(folder)


def last_good(folder: Path) -> str:
    """Return the part of a message that says what is left when a save failed."""
    steps = storage.steps(folder)
    return f"step {steps[-1]} is still good" if steps else "no earlier step is there"


@dataclasses.dataclass(frozen=True)
class PendingSave:
    """A copy of all that a rank has to write of a step; what only rank 0 writes is empty on the others.

    Attributes:
        number: of the step. names: of the state's leaves that have elements. blocks: those that this rank writes.
        arrays, files, header, metrics: rank 0's.
        needed_bytes: on the disk, all ranks together.
    """

    number: int
    names: list[str]
    blocks: Mapping[str, Block]
    arrays: Mapping[str, np.ndarray]
    files: Mapping[str, bytes]
    header: Mapping[str, Any]
    metrics: Mapping[str, float] | None
    needed_bytes: int


@dataclasses.dataclass
class CheckpointWriter:
    """What writes to a folder: the ranks, by a line that nothing else uses, and on rank 0 orbax's CheckpointManager."""

    folder: Path
    config: CheckpointConfig
    ranks: ControlGroup
    orbax: Any = None


def open_orbax(writer: CheckpointWriter) -> None:
    """Give rank 0 a CheckpointManager, and clear away what a failed or killed save left in the folder."""
    saved_metrics(writer.folder)  # names a damaged metrics file, of which orbax would only say that it is no JSON
    policy = preservation_policy(writer.config)
    writer.orbax = storage.open_orbax_manager(writer.folder, policy, best_score)


def commit(writer: CheckpointWriter, step: PendingSave) -> None:
    """Write a step; every rank calls this, in any thread. It is complete, or raises on all ranks, when this ends.

    Raises:
        UserError: says why it could not be written, and what is left.
    """
    ranks = writer.ranks
    try:
        with raise_on_any_failure(ranks):
            if ranks.rank == 0:
                _save_on_rank0(writer, step)
            else:
                folder = distributed.broadcast_object(ranks)
                if folder is not None:
                    _write_blocks(ranks, Path(folder), step.blocks)
    except LostRankError as error:
        raise LostRankError(
            f"checkpoint of step {step.number} could not be written to {writer.folder} ({error}); "
            f"{last_good(writer.folder)}"
        ) from error


def _save_on_rank0(writer: CheckpointWriter, step: PendingSave) -> None:
    """Rank 0's part: orbax makes a folder, all ranks write into it, orbax completes it."""
    told = False

    def write_state(folder: Path) -> None:
        nonlocal told
        told = True
        distributed.broadcast_object(writer.ranks, str(folder))
        _write_blocks(writer.ranks, folder, step.blocks)

    def write_arrays(folder: Path) -> None:
        storage.write_blocks(
            folder, 0, {name: storage.whole_block(array) for name, array in step.arrays.items() if array.size}
        )

    try:
        items = {"state": storage.arrays_item(step.names, write_state), "meta": storage.json_item(step.header)}
        names = [name for name, array in step.arrays.items() if array.size]
        if names:
            items["arrays"] = storage.arrays_item(names, write_arrays)
        if step.files:
            items["files"] = storage.files_item(step.files)
        args = storage.orbax().args.Composite(**items)
        metrics = dict(step.metrics) if step.metrics else None
        if not writer.orbax.save(step.number, args=args, metrics=metrics, force=True):
            raise OSError("orbax declined to write it")
        storage.clear(writer.folder)
    except LostRankError:
        raise
    except Exception as error:
        if not told:
            distributed.broadcast_object(writer.ranks, None)
        raise _clean_up_failed_save(writer, step, error) from error


def _write_blocks(ranks: ControlGroup, folder: Path, blocks: Mapping[str, Block]) -> None:
    with raise_on_any_failure(ranks):
        try:
            if not folder.is_dir():
                raise UserError(f"{folder} is not there: checkpoints need a file system that all nodes share")
            storage.write_blocks(folder, ranks.rank, blocks)
        except Exception as error:
            if ranks.size == 1:
                raise
            raise UserError(f"rank {ranks.rank}: {integrity.reason(error)}") from error


def _clean_up_failed_save(writer: CheckpointWriter, step: PendingSave, error: Exception) -> UserError:
    """Give back the room that a failed save took, and leave the writer fit for another try; return what to raise."""
    with contextlib.suppress(Exception):  # it repeats the failure
        writer.orbax.close()
    open_orbax(writer)
    free_bytes = shutil.disk_usage(writer.folder).free
    return UserError(
        f"checkpoint of step {step.number} could not be written to {writer.folder} ({integrity.reason(error)}); "
        f"it needs {step.needed_bytes / 1e6:.1f} MB, {free_bytes / 1e6:.1f} MB are free; "
        f"{last_good(writer.folder)}"
    )


# a part of what this module offers

LEAF_DTYPES = ("float32", "bfloat16", "float16", "int32", "int64", "uint8", "bool")

State = TypeVar("State", bound=tuple)


@dataclasses.dataclass
class Manager:
    """An open checkpoint folder: the ranks that have it open, what writes, and the save in the background if any."""

    folder: Path
    config: CheckpointConfig
    ranks: ControlGroup
    writer: CheckpointWriter
    saving: Future[None] | None = None


def open_manager(folder: Path, config: CheckpointConfig = CheckpointConfig()) -> Manager:
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
    ranks, writer = distributed.create_group(), CheckpointWriter(folder, config, distributed.create_group())
    with raise_on_any_failure(ranks):
        if ranks.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"checkpoint folder {folder} cannot be made: {integrity.reason(error)}") from error
            open_orbax(writer)
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
    with raise_on_any_failure(ranks):
        leaves = _leaves(state)
        parts = {name: integrity.local_part(leaf, name) for name, leaf in leaves.items()}
        specs = {name: integrity.tensor_spec(leaf) for name, leaf in leaves.items()}
        buffers = {n: storage.to_numpy(a) if isinstance(a, Tensor) else np.array(a) for n, a in (arrays or {}).items()}
        described = integrity.describe_arrays(buffers)
    _require_same(ranks, {**specs, **described})
    survey = integrity.gather_part_indices(
        ranks, parts, {name: integrity.local_values(leaf) for name, leaf in leaves.items()}
    )
    with raise_on_any_failure(ranks):
        step, fingerprints = int(state.step), integrity.fingerprints(survey, list(leaves))
        specs = {name: {**spec, "fingerprint": fingerprints[name]} for name, spec in specs.items()}
        contents = _read_files(files or {}) if ranks.rank == 0 else {}
        header = integrity.build(step, meta, specs, described, contents)
    exists = _first(ranks, lambda: _has_step(manager, step))
    if exists and integrity.matches_saved(folder / str(step), header, leaves, ranks):
        if metrics:
            add_metrics(manager, step, metrics)
        return
    needed_bytes = tree.nbytes(leaves) + sum(a.nbytes for a in buffers.values()) + sum(map(len, contents.values()))
    needed_bytes += needed_bytes // 100 + len(json.dumps(header)) + 2**20  # orbax's indices, and blocks half full
    with raise_on_any_failure(ranks):
        if ranks.rank == 0:
            if exists:  # and is damaged
                manager.writer.orbax.delete(step)
                storage.clear(folder)
            make_room(manager.writer.orbax, folder, manager.config, step, needed_bytes, metrics)
        mine = dict(zip(leaves, integrity.parts_to_write(survey, ranks.rank)))
        blocks = {name: _block(leaf, parts[name]) for name, leaf in leaves.items() if mine[name] and leaf.numel()}
    names = [name for name, leaf in leaves.items() if leaf.numel()]
    copy = PendingSave(step, names, blocks, buffers, contents, header, metrics, needed_bytes)
    background = ThreadPoolExecutor(1, "checkpoint")
    manager.saving = background.submit(commit, manager.writer, copy)
    background.shutdown(wait=False)  # no second task will come
    if not manager.config.asynchronous:
        wait(manager)


def add_metrics(manager: Manager, step: int, metrics: Mapping[str, float]) -> None:
    """Give a step that was saved before it was evaluated its metrics; one that has some keeps them.

    Raises:
        UserError: they cannot be written.
    """
    wait(manager)
    path = metrics_path(manager.folder, step)
    with raise_on_any_failure(manager.ranks):
        if manager.ranks.rank == 0 and not path.exists():
            try:
                path.parent.mkdir(exist_ok=True)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(dict(metrics)))
                partial.replace(path)
            except OSError as error:
                raise UserError(f"metrics of step {step}: {path}: {integrity.reason(error)}") from error


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
        distributed.destroy_group(manager.ranks)
        distributed.destroy_group(manager.writer.ranks)


def steps(source: Manager | Path) -> list[int]:
    """Return the complete steps in rising order; of a manager, as rank 0 sees them: every rank asks."""
    return _first(_line(source), lambda: storage.steps(_folder(source)))


def latest_step(source: Manager | Path) -> int | None:
    """Return the newest complete step, or None; asked as `steps`."""
    return max(steps(source), default=None)


def best_step(source: Manager | Path) -> int | None:
    """Return the step with the lowest val/bpb (the newest of equals), or None where no step has one."""
    scores = {step: best_score(metrics) for step, metrics in describe(source).items()}
    scored = [step for step, score in scores.items() if score < math.inf]
    return min(scored, key=lambda step: (scores[step], -step), default=None)


def describe(source: Manager | Path) -> dict[int, dict[str, float]]:
    """Return {step: metrics} of the complete steps; a step that was saved without has none. Asked as `steps`."""
    return dict(_first(_line(source), lambda: list(saved_metrics(_folder(source)).items())))


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
        header = _first(ranks, lambda: integrity.read(path))
        with raise_on_any_failure(ranks):
            like = _leaves(abstract_state)
            integrity.compare(path, header["state"], {name: integrity.tensor_spec(leaf) for name, leaf in like.items()})
        parts = integrity.read_leaves(path, header["state"], device, like, ranks)
        with raise_on_any_failure(ranks):
            arrays = integrity.read_arrays(path, header["arrays"])
    leaves = {name: integrity.assemble(part, like[name]) for name, part in parts.items()}
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
    path = _locate(folder, step, ControlGroup())
    header = integrity.read(path)
    saved = {name: spec for name, spec in header["state"].items() if name.startswith("params.")}
    leaves = integrity.read_leaves(path, saved, device)
    if dtype is not None:
        leaves = {name: x.to(dtype) if x.is_floating_point() else x for name, x in leaves.items()}
    params = tree.unflatten({name.removeprefix("params."): x for name, x in leaves.items()})
    return params, header["meta"], integrity.check_files(path, header["files"])


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
        if integrity.tensor_spec(leaf)["dtype"] not in LEAF_DTYPES:
            raise UserError(
                f"{name} is {integrity.tensor_spec(leaf)['dtype']}: checkpoints hold {', '.join(LEAF_DTYPES)}"
            )
    return leaves


def _rebuild(like: Any, leaves: Mapping[str, Tensor], name: str) -> Any:
    if not isinstance(like, TensorDictBase | Mapping):
        return leaves[name]
    fields = {key: _rebuild(value, leaves, f"{name}.{key}") for key, value in like.items()}
    return TensorDict(fields, like.batch_size) if isinstance(like, TensorDictBase) else fields


def _block(leaf: Tensor, part: Part) -> storage.Block:
    return storage.Block(
        storage.to_numpy(integrity.local_values(leaf)),
        leaf.shape,
        part.offsets,
        integrity.chunk(part.sizes, leaf.element_size()),
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


def _line(source: Manager | Path) -> ControlGroup:
    return source.ranks if isinstance(source, Manager) else ControlGroup()


@contextlib.contextmanager
def _talking(source: Manager | Path) -> Iterator[ControlGroup]:
    """Give the manager's ranks, or all ranks of the job for as long as a folder is read."""
    if isinstance(source, Manager):
        wait(source)
        yield source.ranks
        return
    ranks = distributed.create_group()
    try:
        yield ranks
    finally:
        distributed.destroy_group(ranks)


def _first(ranks: ControlGroup, ask: Callable[[], Any]) -> Any:
    """Return on every rank what rank 0 gets when it asks."""
    with raise_on_any_failure(ranks):
        answer = ask() if ranks.rank == 0 else None
    return distributed.broadcast_object(ranks, answer)


def _require_same(ranks: ControlGroup, described: Mapping[str, Any]) -> None:
    first = distributed.broadcast_object(ranks, described)
    with raise_on_any_failure(ranks):
        for name in {**first, **described}:
            if first.get(name) != described.get(name):
                raise UserError(f"{name} differs between rank 0 and rank {ranks.rank}, which should hold the same")


def _has_step(manager: Manager, step: int) -> bool:
    manager.writer.orbax.reload()  # a step may have been deleted by hand, or given metrics
    return step in manager.writer.orbax.all_steps()


def _locate(source: Manager | Path, step: int | None, ranks: ControlGroup) -> Path:
    folder, there = _folder(source), _first(ranks, lambda: storage.steps(_folder(source)))
    if not there:
        raise UserError(f"no checkpoint in {folder}")
    if step is not None and step not in there:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are steps {', '.join(map(str, there))}")
    return folder / str(there[-1] if step is None else step)
