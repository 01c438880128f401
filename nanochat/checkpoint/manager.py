"""Save and restore train states: atomic, asynchronous, sharded, and verified leaf by leaf.

A step is the folder `<folder>/<step>`, written by orbax, with these items:
    state/    every leaf of the train state, as a PyTree that plain JAX and orbax can read
    arrays/   further arrays that are equal on every rank (the loader's buffer), also a PyTree
    meta/     JSON: the caller's values, and shape, dtype and checksum of everything else
    files/    small files, copied (the tokenizer)
    metrics/  JSON: the metrics that `keep_best` uses

orbax writes to a temporary folder and renames it, so every listed step is complete. With several processes these are
collective calls: each process writes and reads its own shards on a common folder, rank 0 creates and deletes steps, and
an error on one rank is raised on all. A state may be restored with another sharding.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import types
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from nanochat import distributed, jsonl, model, tree
from nanochat.checkpoint import adapters, integrity, storage
from nanochat.checkpoint.config import CheckpointConfig
from nanochat.checkpoint.storage import Block
from nanochat.config import UserError
from nanochat.distributed import ControlGroup, LostRankError, raise_on_any_failure, sharding

BEST_METRIC = "val/bpb"  # lower is better

State = TypeVar("State", bound=Any)  # a NamedTuple


@dataclasses.dataclass
class Manager:
    """An open checkpoint folder; `group` is for the thread that trains, `writer_group` for the one that writes."""

    folder: Path
    config: CheckpointConfig
    group: ControlGroup
    writer_group: ControlGroup
    orbax: Any = None  # rank 0's CheckpointManager
    saving: Future[None] | None = None


def open_manager(folder: Path, config: CheckpointConfig = CheckpointConfig()) -> Manager:
    """Open a folder for saving: create it if needed, and remove what a killed save left there.

    Only one job may have a folder open; others may read it (`restore`, `load_params`, …) meanwhile.
    """
    folder = Path(folder).absolute()
    manager = Manager(folder, config, distributed.control_group(), distributed.control_group(background=True))
    with raise_on_any_failure(manager.group):
        if manager.group.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"checkpoint folder {folder} cannot be created: {integrity.reason(error)}") from error
            _open_orbax(manager)
    return manager


def save(
    manager: Manager,
    state: Any,
    meta: Mapping[str, Any],
    *,
    arrays: Mapping[str, np.ndarray | Tensor] | None = None,
    files: Mapping[str, Path] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Save `state` as step `int(state.step)`; earlier steps stay intact whatever happens.

    Buffers may be changed in place when this returns. An error in the background is raised by the next `save`, `wait`
    or `close`.

    An existing step is kept if it is intact and equal, replaced if it is corrupt, and otherwise an error. If the disk
    is too full, steps that this save would delete afterwards are deleted first, if that frees enough and leaves one.

    Args:
        state: NamedTuple of tensors and nested TensorDicts with a 0-d integer tensor `step`. A leaf is a plain tensor,
            equal on every rank, or an evenly sharded DTensor.
        meta: JSON values, rank 0's.
        arrays: numeric arrays, equal on every rank; a dot in a name nests it.
        files: name in the checkpoint → file to copy, rank 0's.
        metrics: the step with the lowest `val/bpb` is the best one.
    """
    wait(manager)
    group, folder = manager.group, manager.folder
    with raise_on_any_failure(group):
        leaves = tree.flatten(state._asdict())
        shards = {name: integrity.local_shard(leaf, name) for name, leaf in leaves.items()}
        specs = {name: integrity.tensor_spec(leaf) for name, leaf in leaves.items()}
        copies = {n: storage.to_numpy(a) if isinstance(a, Tensor) else np.array(a) for n, a in (arrays or {}).items()}
        array_specs = integrity.array_specs(copies)
    _require_equal(group, {**specs, **array_specs})
    local = sharding.local_shards(leaves)
    shard_checksums = integrity.gather_shard_checksums(group, shards, local)
    with raise_on_any_failure(group):
        fingerprints = integrity.full_fingerprints(shard_checksums, list(leaves))
        specs = {name: {**spec, "fingerprint": fingerprints[name]} for name, spec in specs.items()}
        contents = {}
        for name, path in (files or {}).items() if group.rank == 0 else ():
            try:
                contents[name] = Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be copied to the checkpoint ({integrity.reason(error)})") from error
        step = int(state.step)
        header = integrity.build_header(step, meta, specs, array_specs, contents)
    exists = _from_rank0(group, lambda: step in storage.steps(folder))
    if exists and integrity.matches_saved(folder / str(step), header, leaves, group):
        if metrics:
            add_metrics(manager, step, metrics)
        return
    needed_bytes = tree.nbytes(leaves) + sum(a.nbytes for a in copies.values()) + sum(map(len, contents.values()))
    needed_bytes += needed_bytes // 100 + len(json.dumps(header)) + 2**20  # orbax's index, and half-full disk blocks
    with raise_on_any_failure(group):
        if group.rank == 0:
            manager.orbax.reload()  # a step may have been deleted by hand, or given metrics
            if exists:  # and is corrupt
                manager.orbax.delete(step)
                storage.remove_partial_steps(folder)
            _make_room(manager, step, needed_bytes, metrics)
        writes = dict(zip(leaves, integrity.shards_to_write(shard_checksums, group.rank)))
        blocks = {
            name: Block(storage.to_numpy(local[name]), leaf.shape, shards[name].offsets)
            for name, leaf in leaves.items()
            if writes[name] and leaf.numel()
        }
    pending = PendingSave(step, blocks, copies, contents, header, metrics, needed_bytes)
    background = ThreadPoolExecutor(1, "checkpoint")
    manager.saving = background.submit(_write, manager, pending)
    background.shutdown(wait=False)
    if not manager.config.asynchronous:
        wait(manager)


def _from_rank0(group: ControlGroup, function: Callable[[], Any]) -> Any:
    """Return on every rank what rank 0 computes."""
    with raise_on_any_failure(group):
        value = function() if group.rank == 0 else None
    return distributed.broadcast_object(value, group=group)


def _require_equal(group: ControlGroup, specs: Mapping[str, Any]) -> None:
    first = distributed.broadcast_object(specs, group=group)
    with raise_on_any_failure(group):
        for name in {**first, **specs}:
            if first.get(name) != specs.get(name):
                raise UserError(f"{name} differs between rank 0 and rank {group.rank}: it should be equal on both")


def add_metrics(manager: Manager, step: int, metrics: Mapping[str, float]) -> None:
    """Add the metrics of a step that was saved before it was evaluated; existing metrics are kept."""
    wait(manager)
    path = metrics_path(manager.folder, step)
    with raise_on_any_failure(manager.group):
        if manager.group.rank == 0 and step in storage.steps(manager.folder) and not path.exists():
            jsonl.write_atomic(path, json.dumps(dict(metrics)))


def wait(manager: Manager) -> None:
    """Wait for the save in the background; its error says which step is the newest intact one."""
    if manager.saving is not None:
        try:
            manager.saving.result()
        finally:
            if manager.saving.done():
                manager.saving = None


def close(manager: Manager) -> None:
    """Wait for the save in the background and close the folder; a rank that failed alone may call this too."""
    try:
        wait(manager)
    finally:
        if manager.orbax is not None:
            manager.orbax.close()


# Reading


def restore(
    source: Manager | Path,
    abstract_state: State,
    step: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[State, dict[str, Any], dict[str, np.ndarray]]:
    """Read a step into a new state with the structure of `abstract_state`; each rank reads its own shards.

    Names, shapes and dtypes are compared before anything is read; fingerprints after, on `device`.

    Args:
        source: an open manager (a save in the background is waited for), or a folder.
        abstract_state: names, shapes, dtypes and placements of the state: meta tensors, or DTensors over them, will do.
            An average of the weights ("ema") is read if it has one.

    Returns: (state, meta, arrays) as they were given to `save`; DTensors where `abstract_state` has them.
    """
    if isinstance(source, Manager):
        wait(source)
    folder = source.folder if isinstance(source, Manager) else source
    group = distributed.control_group()
    path = step_path(folder, step, group)
    header = _from_rank0(group, lambda: integrity.read_header(path))
    with raise_on_any_failure(group):
        like = tree.flatten(abstract_state._asdict())
        expected = {name: integrity.tensor_spec(leaf) for name, leaf in like.items()}
        saved = {n: spec for n, spec in header["state"].items() if n in expected or not n.startswith("ema.")}
        integrity.compare_specs(path, saved, expected)
    shards = integrity.read_leaves(path, saved, device, like, group)
    with raise_on_any_failure(group):
        arrays = integrity.read_arrays(path, header["arrays"])
    leaves = sharding.as_dtensors(shards, like)
    fields = {name: _rebuild(value, leaves, name) for name, value in abstract_state._asdict().items()}
    fields["params"] = _with_saved_config(fields["params"], header["meta"])
    return type(abstract_state)(**fields), header["meta"], arrays


def _rebuild(like: Any, leaves: Mapping[str, Tensor], name: str) -> Any:
    if not isinstance(like, TensorDictBase):
        return leaves[name]
    return tree.unflatten({key: leaves[f"{name}.{key}"] for key in tree.flatten(like)}, like)


def load_params(
    folder: Path, *, step: int | None = None, device: torch.device | str = "cpu", field: str = "params"
) -> tuple[TensorDict, dict[str, Any], dict[str, Path]]:
    """Read the full parameters only, in this process, without knowing the model. Not a collective call.

    Adapters are merged into their base, which is read as well.

    Args:
        field: where they are in the state; "ema.params": the float32 average of the weights.

    Returns: (params, meta, {name: path of the file in the checkpoint}).
    """
    path = step_path(folder, step)
    header = integrity.read_header(path)
    saved = {name: spec for name, spec in header["state"].items() if name.startswith(f"{field}.")}
    leaves = integrity.read_leaves(path, saved, device)
    params = tree.unflatten({name.removeprefix(f"{field}."): x for name, x in leaves.items()})
    if low_rank := header["meta"].get("lora"):
        run = adapters.find_base(path.parents[1], low_rank["base"])
        base, _, _ = load_params(run / "checkpoints", step=low_rank["base"]["step"], device=device)
        params = model.lora.merge(base, model.lora.with_scale(params, low_rank["alpha"], low_rank["rank"]))
    params = _with_saved_config(params, header["meta"])
    return params, header["meta"], integrity.check_files(path, header["files"])


def load_arrays(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read (meta, arrays) of a step as they were given to `save`, in this process. Not a collective call."""
    path = step_path(folder, step)
    header = integrity.read_header(path)
    return header["meta"], integrity.read_arrays(path, header["arrays"])


def _with_saved_config(params: TensorDict, meta: Mapping[str, Any]) -> TensorDict:
    """Return parameters that carry the model's config as the metadata has it, where it has one and they do not."""
    if model.params.CONFIG_KEY in params.keys():  # noqa: SIM118 (a TensorDict has no `in`)
        return params
    try:
        return model.with_config(params, model.ModelConfig(**meta["model"]))
    except (KeyError, TypeError, ValueError):  # not a model of this nanochat: `checkpoint.load` says so
        return params


def steps(source: Manager | Path) -> list[int]:
    """Return the complete steps in ascending order; a collective call on a manager, a local one on a folder."""
    if isinstance(source, Manager):
        return _from_rank0(source.group, lambda: storage.steps(source.folder))
    return storage.steps(Path(source))


def latest_step(source: Manager | Path) -> int | None:
    """Return the newest complete step, or None; collective like `steps`."""
    return max(steps(source), default=None)


def step_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Return {step: metrics} of the complete steps, {} for a step without metrics."""
    metrics = {}
    for step in storage.steps(folder):
        path = metrics_path(folder, step)
        try:
            saved = dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
            metrics[step] = {name: float(value) for name, value in saved.items()}
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            problem = f"{path} cannot be read ({integrity.reason(error)})"
            raise integrity.corruption_error(folder / str(step), problem) from error
    return metrics


def step_path(folder: Path, step: int | None, group: ControlGroup = ControlGroup()) -> Path:
    """Return the folder of a step, by default the newest, as rank 0 sees it."""
    folder = Path(folder).absolute()
    complete = _from_rank0(group, lambda: storage.steps(folder))
    if not complete:
        raise UserError(f"no checkpoint in {folder}")
    if step is not None and step not in complete:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are steps {', '.join(map(str, complete))}")
    return folder / str(complete[-1] if step is None else step)


# Writing a step in the background
#
# The writer threads of all ranks agree on the outcome over their own group, not through the threads that train. So a
# rank that left the training loop with an exception still writes its shards, and no rank waits for it there.


class PendingSave(NamedTuple):
    """A copy of everything that a rank writes of a step; rank 0 alone writes what comes after `blocks`."""

    step: int
    blocks: Mapping[str, Block]  # the shards of leaves that this rank writes
    arrays: Mapping[str, np.ndarray]
    files: Mapping[str, bytes]
    header: Mapping[str, Any]
    metrics: Mapping[str, float] | None
    needed_bytes: int  # on disk, for all ranks together


def _write(manager: Manager, pending: PendingSave) -> None:
    """Write a step; when this returns it is complete, and when it raises it raises on all ranks."""
    group = manager.writer_group
    try:
        with raise_on_any_failure(group):
            if group.rank == 0:
                _save_on_rank0(manager, pending)
            else:
                folder = distributed.broadcast_object(group=group)
                if folder is not None:
                    _write_blocks(group, Path(folder), pending.blocks)
    except LostRankError as error:
        raise LostRankError(
            f"checkpoint of step {pending.step} could not be written to {manager.folder} ({error}); "
            f"{_last_good(manager.folder)}"
        ) from error


def _save_on_rank0(manager: Manager, pending: PendingSave) -> None:
    """Let orbax create a folder, let all ranks write to it, and let orbax publish it as a step."""
    group, started = manager.writer_group, False

    def write_state(folder: Path) -> None:
        nonlocal started
        for name, content in pending.files.items():  # beside orbax's items
            (folder.parent / "files").mkdir(exist_ok=True)
            (folder.parent / "files" / name).write_bytes(content)
        started = True
        distributed.broadcast_object(str(folder), group=group)
        _write_blocks(group, folder, pending.blocks)

    names = [name for name, leaf in pending.header["state"].items() if math.prod(leaf["shape"])]
    arrays = {name: Block(x, x.shape, (0,) * x.ndim) for name, x in pending.arrays.items() if x.size}
    try:
        items = {
            "state": storage.arrays_item(names, write_state),
            "meta": storage.orbax().args.JsonSave(dict(pending.header)),
        }
        if arrays:
            items["arrays"] = storage.arrays_item(arrays, lambda folder: storage.write_blocks(folder, 0, arrays))
        args = storage.orbax().args.Composite(**items)
        metrics = dict(pending.metrics) if pending.metrics else None
        if not manager.orbax.save(pending.step, args=args, metrics=metrics, force=True):
            raise OSError("orbax declined to write it")
        storage.remove_partial_steps(manager.folder)
    except LostRankError:
        raise
    except Exception as error:
        if not started:
            distributed.broadcast_object(None, group=group)
        # Free the disk space, and make the manager usable again.
        with contextlib.suppress(Exception):  # it raises the error again
            manager.orbax.close()
        _open_orbax(manager)
        free_bytes = shutil.disk_usage(manager.folder).free
        raise UserError(
            f"checkpoint of step {pending.step} could not be written to {manager.folder} ({integrity.reason(error)}); "
            f"it needs {pending.needed_bytes / 1e6:.1f} MB, {free_bytes / 1e6:.1f} MB are free; "
            f"{_last_good(manager.folder)}"
        ) from error


def _write_blocks(group: ControlGroup, folder: Path, blocks: Mapping[str, Block]) -> None:
    with raise_on_any_failure(group):
        try:
            if not folder.is_dir():
                raise UserError(f"{folder} does not exist: checkpoints need a file system that all nodes share")
            storage.write_blocks(folder, group.rank, blocks)
        except Exception as error:
            if group.size == 1:
                raise
            raise UserError(f"rank {group.rank}: {integrity.reason(error)}") from error


# Which steps are kept


def _open_orbax(manager: Manager) -> None:
    """Open rank 0's CheckpointManager, after removing what a killed process left in the folder."""
    step_metrics(manager.folder)  # names a corrupt metrics file; orbax would only raise JSONDecodeError
    storage.remove_partial_steps(manager.folder)
    ocp = storage.orbax()
    options = ocp.CheckpointManagerOptions(
        create=False,
        best_fn=_score,
        best_mode="min",
        preservation_policy=_preservation_policy(manager.config),
        todelete_subdir=storage.DELETED,  # a kill during a deletion must not leave half a step under its name
        enable_async_checkpointing=False,
    )
    handlers = {"state": storage.arrays_handler(), "arrays": storage.arrays_handler()}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    try:
        manager.orbax = ocp.CheckpointManager(manager.folder, options=options, item_handlers=handlers)
    except (ValueError, TypeError, RecursionError) as error:
        problem = f"a _CHECKPOINT_METADATA in it is corrupt ({integrity.reason(error)}); delete that file"
        raise UserError(f"checkpoint folder {manager.folder} cannot be opened: {problem}") from None


def _preservation_policy(config: CheckpointConfig) -> Any:
    policies = storage.orbax().checkpoint_managers
    kept = [policies.LatestN(config.keep_last)]
    if config.keep_best:
        kept.append(policies.BestN(get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    if config.keep_every_steps is not None:
        kept.append(policies.EveryNSteps(config.keep_every_steps))
    return policies.AnyPreservationPolicy(kept)


def _score(metrics: Mapping[str, float]) -> float:
    value = metrics.get(BEST_METRIC, math.inf)
    return value if math.isfinite(value) else math.inf


def metrics_path(folder: Path, step: int) -> Path:
    """Return where orbax's CheckpointManager keeps the metrics of a step."""
    return folder / str(step) / "metrics" / "metrics"


def _make_room(manager: Manager, step: int, needed_bytes: int, metrics: Mapping[str, float] | None) -> None:
    """Raise UserError if the disk is too full, unless deleting the steps that this save will delete frees enough."""
    folder = manager.folder
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= needed_bytes:
        return
    after_save = {**step_metrics(folder), step: metrics}
    infos = [types.SimpleNamespace(step=s, metrics=m or None) for s, m in after_save.items()]
    kept = _preservation_policy(manager.config).should_preserve(infos, context=None)
    latest = max(storage.steps(folder), default=None)
    deleted = [info.step for info, keep in zip(infos, kept) if not keep and info.step not in (step, latest)]
    freed_bytes = sum(p.stat().st_size for s in deleted for p in (folder / str(s)).rglob("*") if p.is_file())
    if free_bytes + freed_bytes < needed_bytes:
        raise UserError(
            f"checkpoint of step {step} needs {needed_bytes / 1e6:.1f} MB, {folder} has {free_bytes / 1e6:.1f} MB "
            f"free: make room or save to another folder; {_last_good(folder)}"
        )
    for old in deleted:
        manager.orbax.delete(old)
    storage.remove_partial_steps(folder)


def _last_good(folder: Path) -> str:
    complete = storage.steps(folder)
    return f"step {complete[-1]} is intact" if complete else "there is no earlier step"
