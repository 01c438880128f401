"""One step on its way to the disk: each rank writes its blocks in the background, and rank 0 lets orbax complete it.

All ranks learn how it ended, whoever failed, without a word between the threads that train: a rank that has left the
training loop by an exception can still finish its part, and nobody waits for it there.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanochat import manifest, retention, store
from nanochat import ranks as jobs
from nanochat.config import UserError
from nanochat.ranks import LostRankError, Ranks, together
from nanochat.retention import CheckpointConfig
from nanochat.store import Block


@dataclasses.dataclass(frozen=True)
class Step:
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
class Writer:
    """What writes to a folder: the ranks, by a line that nothing else uses, and on rank 0 orbax's CheckpointManager."""

    folder: Path
    config: CheckpointConfig
    ranks: Ranks
    orbax: Any = None


def open_orbax(writer: Writer) -> None:
    """Give rank 0 a CheckpointManager, and clear away what a failed or killed save left in the folder."""
    retention.describe(writer.folder)  # names a damaged metrics file, of which orbax would only say that it is no JSON
    policy = retention.policy(writer.config)
    writer.orbax = store.open_manager(writer.folder, policy, retention.score)


def write(writer: Writer, step: Step) -> None:
    """Write a step; every rank calls this, in any thread. It is complete, or raises on all ranks, when this ends.

    Raises:
        UserError: says why it could not be written, and what is left.
    """
    ranks = writer.ranks
    try:
        with together(ranks):
            if ranks.rank == 0:
                _lead(writer, step)
            else:
                folder = jobs.tell(ranks)
                if folder is not None:
                    _write_blocks(ranks, Path(folder), step.blocks)
    except LostRankError as error:
        raise LostRankError(
            f"checkpoint of step {step.number} could not be written to {writer.folder} ({error}); "
            f"{retention.last_good(writer.folder)}"
        ) from error


def _lead(writer: Writer, step: Step) -> None:
    """Rank 0's part: orbax makes a folder, all ranks write into it, orbax completes it."""
    told = False

    def write_state(folder: Path) -> None:
        nonlocal told
        told = True
        jobs.tell(writer.ranks, str(folder))
        _write_blocks(writer.ranks, folder, step.blocks)

    def write_arrays(folder: Path) -> None:
        store.write_blocks(folder, 0, {name: store.whole(array) for name, array in step.arrays.items() if array.size})

    try:
        items = {"state": store.arrays_item(step.names, write_state), "meta": store.json_item(step.header)}
        names = [name for name, array in step.arrays.items() if array.size]
        if names:
            items["arrays"] = store.arrays_item(names, write_arrays)
        if step.files:
            items["files"] = store.files_item(step.files)
        args = store.orbax().args.Composite(**items)
        metrics = dict(step.metrics) if step.metrics else None
        if not writer.orbax.save(step.number, args=args, metrics=metrics, force=True):
            raise OSError("orbax declined to write it")
        store.clear(writer.folder)
    except LostRankError:
        raise
    except Exception as error:
        if not told:
            jobs.tell(writer.ranks, None)
        raise _given_up(writer, step, error) from error


def _write_blocks(ranks: Ranks, folder: Path, blocks: Mapping[str, Block]) -> None:
    with together(ranks):
        try:
            if not folder.is_dir():
                raise UserError(f"{folder} is not there: checkpoints need a file system that all nodes share")
            store.write_blocks(folder, ranks.rank, blocks)
        except Exception as error:
            if ranks.size == 1:
                raise
            raise UserError(f"rank {ranks.rank}: {manifest.reason(error)}") from error


def _given_up(writer: Writer, step: Step, error: Exception) -> UserError:
    """Give back the room that a failed save took, and leave the writer fit for another try; return what to raise."""
    with contextlib.suppress(Exception):  # it repeats the failure
        writer.orbax.close()
    open_orbax(writer)
    free_bytes = shutil.disk_usage(writer.folder).free
    return UserError(
        f"checkpoint of step {step.number} could not be written to {writer.folder} ({manifest.reason(error)}); "
        f"it needs {step.needed_bytes / 1e6:.1f} MB, {free_bytes / 1e6:.1f} MB are free; "
        f"{retention.last_good(writer.folder)}"
    )
