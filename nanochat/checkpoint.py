"""Checkpoints: atomic, asynchronous, and verified leaf by leaf when they are read.

A checkpoint is the folder `<folder>/<step>`, written by orbax, with these items:
    state/    every leaf of the train state, a PyTree that plain JAX and orbax read
    arrays/   further arrays that are equal on every rank (the loader's buffer), a PyTree as well
    meta/     JSON: the caller's values, and shape, dtype and checksum of everything beside it
    files/    small files, copied in as they are (the tokenizer's)
    metrics/  JSON: the numbers that `keep_best` goes by

orbax writes into a temporary folder and renames it, so a step that is listed is complete; a step that has to go is
renamed before its files are removed. What orbax and the disk do not notice (a flipped byte, an exchanged leaf,
another shape or dtype, a leaf that is not there) is found here and ends in one `UserError`.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nanochat import manifest, store, tree
from nanochat.config import UserError

BEST_METRIC = "val/bpb"  # the lower the better
LEAF_DTYPES = ("float32", "bfloat16", "float16", "int32", "int64", "uint8", "bool")

State = TypeVar("State", bound=tuple)


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


@dataclasses.dataclass
class Manager:
    """An open checkpoint folder: `orbax` is its CheckpointManager, `saving` the (step, bytes) being written."""

    folder: Path
    config: CheckpointConfig
    orbax: Any
    saving: tuple[int, int] | None = None


def open(folder: Path, config: CheckpointConfig = CheckpointConfig()) -> Manager:
    """Open `folder` for saving, make it if need be, and clear away what a killed save left there.

    One process at a time may have a folder open; `restore`, `load_params` and the rest may read it meanwhile.

    Raises:
        UserError: the folder cannot be made or read, a setting makes no sense, or the job has several processes.
    """
    for name in ("every_steps", "keep_last", "keep_every_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"checkpoint {name}={value}: expected a number above 0, or none")
    _require_one_process()
    folder = _folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"checkpoint folder {folder} cannot be made: {manifest.reason(error)}") from error
    return Manager(folder, config, _open_orbax(folder, config))


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

    Everything is copied before this returns, so the caller may change its buffers in place at once. What goes wrong
    in the background is raised by the next `save`, `wait` or `close`.

    A step that exists is left as it is if it is sound and holds the same state, arrays and files (`metrics` are added
    if it has none), and is replaced if it is damaged. When the disk is short of room, steps that this save would
    delete afterwards are deleted before it, as long as another one remains and that helps; else nothing is deleted.

    Args:
        state: NamedTuple of tensors and nested TensorDicts; its field `step` is a 0-d integer tensor.
        meta: JSON values; given back as JSON gives them back (tuples become lists, keys strings).
        arrays: numeric arrays of any shape, equal on every rank; a dot in a name nests it.
        files: name in the checkpoint → file to copy.
        metrics: of this step; `val/bpb` decides which step is the best.

    Raises:
        UserError: the disk is full or not writable, this step exists with other values, or an earlier save failed.
    """
    _require_one_process()
    wait(manager)
    step, leaves = int(state.step), _leaves(state)
    buffers = {n: store.to_numpy(a) if isinstance(a, Tensor) else np.array(a) for n, a in (arrays or {}).items()}
    try:
        contents = {name: Path(path).read_bytes() for name, path in (files or {}).items()}
    except OSError as error:
        raise UserError(
            f"{error.filename} belongs into the checkpoint and cannot be read ({error.strerror})"
        ) from error
    header = manifest.build(step, meta, leaves, buffers, contents)
    manager.orbax.reload()  # a step may have been deleted by hand, or given metrics
    if step in manager.orbax.all_steps():
        if manifest.is_sound_copy(manager.folder / str(step), header):
            if metrics:
                add_metrics(manager, step, metrics)
            return
        manager.orbax.delete(step)
        store.clear(manager.folder)
    needed_bytes = tree.nbytes(leaves) + sum(a.nbytes for a in buffers.values()) + sum(map(len, contents.values()))
    needed_bytes += needed_bytes // 100 + len(json.dumps(header)) + 2**20  # orbax's indices, and blocks half full
    _make_room(manager, step, needed_bytes, metrics)
    items = {"state": store.arrays_item({name: store.to_numpy(x) for name, x in leaves.items() if x.numel()})}
    items["meta"] = store.json_item(header)
    if any(a.size for a in buffers.values()):
        items["arrays"] = store.arrays_item({name: a for name, a in buffers.items() if a.size})
    if contents:
        items["files"] = store.files_item(contents)
    manager.saving = (step, needed_bytes)
    with _reporting_failure(manager):
        args = store.orbax().args.Composite(**items)
        if not manager.orbax.save(step, args=args, metrics=dict(metrics) if metrics else None, force=True):
            raise OSError("orbax declined to write it")
    if not manager.config.asynchronous:
        wait(manager)


def add_metrics(manager: Manager, step: int, metrics: Mapping[str, float]) -> None:
    """Give a step that was saved before it was evaluated its metrics; one that has some keeps them."""
    wait(manager)
    path = _metrics_path(manager.folder, step)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dict(metrics)))
        partial.replace(path)


def wait(manager: Manager) -> None:
    """Return when nothing is being written any more.

    Raises:
        UserError: the save in the background failed; names the reason and the newest step that is whole.
    """
    if manager.saving is not None:
        with _reporting_failure(manager):
            manager.orbax.wait_until_finished()
        manager.saving = None
        store.clear(manager.folder)


def close(manager: Manager) -> None:
    """Wait for the save in the background, then let go of the folder.

    Raises:
        UserError: as `wait` does.
    """
    try:
        wait(manager)
    finally:
        manager.orbax.close()


def steps(source: Manager | Path) -> list[int]:
    """Return the complete steps in rising order."""
    return store.steps(_folder(source))


def latest_step(source: Manager | Path) -> int | None:
    """Return the newest complete step, or None."""
    return max(steps(source), default=None)


def best_step(source: Manager | Path) -> int | None:
    """Return the step with the lowest val/bpb (the newest of equals), or None where no step has one."""
    scores = {step: _score(metrics) for step, metrics in describe(source).items()}
    scored = [step for step, score in scores.items() if score < math.inf]
    return min(scored, key=lambda step: (scores[step], -step), default=None)


def describe(source: Manager | Path) -> dict[int, dict[str, float]]:
    """Return {step: metrics} of the complete steps; a step that was saved without has none."""
    found = {}
    for step in steps(source):
        path = _metrics_path(_folder(source), step)
        try:
            found[step] = dict(json.loads(path.read_text())) if path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            at = _folder(source) / str(step)
            raise manifest.damaged(at, f"{path} cannot be read ({manifest.reason(error)})") from error
    return found


def restore(
    source: Manager | Path,
    abstract_state: State,
    mesh: DeviceMesh | None = None,
    step: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[State, dict[str, Any], dict[str, np.ndarray]]:
    """Read a checkpoint into a new state of `abstract_state`'s structure.

    Names, shapes and dtypes are compared before anything is read, every leaf's fingerprint when it is on `device`.

    Args:
        source: an open manager (what it is writing is waited for), or a folder, which is only read.
        abstract_state: as given to `save`; only names, shapes and dtypes count, so meta tensors will do.
        mesh: None, or a mesh of one process.
        step: None: the newest.
        device: where the tensors are to be.

    Returns:
        (state, meta, arrays) as they were given to `save`.

    Raises:
        UserError: no such step, or the checkpoint of another model.
        UserError: a byte has changed or is missing (`manifest.DamagedCheckpoint`); names leaf, step, and way out.
    """
    _require_one_process(mesh)
    path = _locate(source, step)
    header = manifest.read(path)
    wanted = {name: manifest.spec(leaf) for name, leaf in _leaves(abstract_state).items()}
    manifest.compare(path, header["state"], wanted)
    leaves = manifest.read_leaves(path, header["state"], device)
    fields = {name: _rebuild(value, leaves, name) for name, value in _fields(abstract_state).items()}
    return type(abstract_state)(**fields), header["meta"], manifest.read_arrays(path, header["arrays"])


def load_params(
    folder: Path, *, step: int | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[TensorDict, dict[str, Any], dict[str, Path]]:
    """Read the parameters alone: not the optimizer's state, and without knowing the model.

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
    path = _locate(folder, step)
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
        if isinstance(leaf, DTensor):
            raise UserError(f"{name} is sharded: checkpoints hold whole tensors, written by one process")
        if manifest.spec(leaf)["dtype"] not in LEAF_DTYPES:
            raise UserError(f"{name} is {manifest.spec(leaf)['dtype']}: checkpoints hold {', '.join(LEAF_DTYPES)}")
    return leaves


def _rebuild(like: Any, leaves: Mapping[str, Tensor], name: str) -> Any:
    if not isinstance(like, TensorDictBase | Mapping):
        return leaves[name]
    fields = {key: _rebuild(value, leaves, f"{name}.{key}") for key, value in like.items()}
    return TensorDict(fields, like.batch_size) if isinstance(like, TensorDictBase) else fields


# Where it lies


def _folder(source: Manager | Path) -> Path:
    return source.folder if isinstance(source, Manager) else Path(source).absolute()


def _locate(source: Manager | Path, step: int | None) -> Path:
    if isinstance(source, Manager):
        wait(source)
    folder, there = _folder(source), steps(source)
    if not there:
        raise UserError(f"no checkpoint in {folder}")
    if step is not None and step not in there:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are steps {', '.join(map(str, there))}")
    return folder / str(there[-1] if step is None else step)


def _metrics_path(folder: Path, step: int) -> Path:
    return folder / str(step) / "metrics" / "metrics"  # where CheckpointManager keeps them


# What a save does besides


def _make_room(manager: Manager, step: int, needed_bytes: int, metrics: Mapping[str, float] | None) -> None:
    """Fail before writing where the disk is too full, unless steps that are due to go anyway make enough room."""
    folder = manager.folder
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= needed_bytes:
        return
    infos = [types.SimpleNamespace(step=s, metrics=m or None) for s, m in {**describe(folder), step: metrics}.items()]
    stays = _policy(manager.config).should_preserve(infos, context=None)
    latest = latest_step(folder)
    doomed = [info.step for info, stay in zip(infos, stays) if not (stay or info.step in (step, latest))]
    freed_bytes = sum(p.stat().st_size for s in doomed for p in (folder / str(s)).rglob("*") if p.is_file())
    if free_bytes + freed_bytes < needed_bytes:
        raise UserError(
            f"checkpoint of step {step} needs {needed_bytes / 1e6:.1f} MB, {folder} has {free_bytes / 1e6:.1f} MB "
            f"free: make room or save to another folder; {_last_good(folder)}"
        )
    for old in doomed:
        manager.orbax.delete(old)
    store.clear(folder)


@contextlib.contextmanager
def _reporting_failure(manager: Manager) -> Iterator[None]:
    """Turn a failed save into one line, give back the room it took, and leave the manager fit for another try."""
    try:
        yield
    except Exception as error:
        assert manager.saving is not None
        (step, needed_bytes), manager.saving = manager.saving, None
        with contextlib.suppress(Exception):  # it repeats the failure
            manager.orbax.close()
        manager.orbax = _open_orbax(manager.folder, manager.config)
        free_bytes = shutil.disk_usage(manager.folder).free
        raise UserError(
            f"checkpoint of step {step} could not be written to {manager.folder} ({manifest.reason(error)}); it needs "
            f"{needed_bytes / 1e6:.1f} MB, {free_bytes / 1e6:.1f} MB are free; {_last_good(manager.folder)}"
        ) from error


def _last_good(folder: Path) -> str:
    last = latest_step(folder)
    return "no earlier step is there" if last is None else f"step {last} is still good"


def _open_orbax(folder: Path, config: CheckpointConfig) -> Any:
    describe(folder)  # names a damaged metrics file, of which orbax would only say that it is no JSON
    return store.open_manager(folder, _policy(config), _score, asynchronous=config.asynchronous)


def _policy(config: CheckpointConfig) -> Any:
    policies = store.orbax().checkpoint_managers
    stays = [policies.LatestN(config.keep_last)]
    if config.keep_best:
        best = policies.BestN(get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        stays.append(best)
    if config.keep_every_steps is not None:
        stays.append(policies.EveryNSteps(config.keep_every_steps))
    return policies.AnyPreservationPolicy(stays)


def _score(metrics: Mapping[str, float]) -> float:
    score = metrics.get(BEST_METRIC, math.inf)
    return score if math.isfinite(score) else math.inf


def _require_one_process(mesh: DeviceMesh | None = None) -> None:
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if max(processes, mesh.size() if mesh is not None else 1) > 1:
        raise UserError("checkpoints are written and resumed by one process: start with --nproc_per_node=1")
