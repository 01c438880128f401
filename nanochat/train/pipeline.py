"""Stages of a longer pipeline: each has a status file with its settings, so that finished ones are skipped.

A stage that is done with the same settings is skipped, one in progress is resumed, and one whose settings changed, or
that follows a stage that ran again, runs again. Rank 0 reads the files and tells the other ranks.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import checkpoint, distributed
from nanochat.config import UserError, flatten
from nanochat.distributed import ControlGroup, raise_on_any_failure

# Settings that do not change the result (but for rounding).
IGNORED = (
    *("resume", "overwrite", "dry_run", "device", "compile", "device_batch_size", "sharding.", "metrics."),
    *("checkpoint.", "download.", "slots", "batch_tokens", "train.chunk_tokens", "train.memory_budget"),
    *("train.attention", "data.token_cache", "data.prefetch_batches", "data.tokenizer_threads"),
    *("eval.every_steps", "eval.sample", "eval.prompts", "core.", "chat."),  # evaluated during the run
)


class StageStatus(NamedTuple):
    """The status of a stage.

    Attributes:
        state: new, in_progress, done, or changed: in progress or done with other settings.
        changes: descriptions of the changed settings. completion_id: unique to each completion; "" before.
        seconds: run time of all starts. before: id of the newest checkpoint that was there when it started.
    """

    state: str
    changes: tuple[str, ...] = ()
    completion_id: str = ""
    seconds: float = 0.0
    before: str = ""


def settings(config: Any, after: str = "") -> dict[str, Any]:
    """Return the settings that the result depends on, by dotted name, as JSON values.

    Args:
        after: completion_id of the stage that it builds on.
    """
    kept = {name: value for name, value in flatten(config) if not name.startswith(IGNORED)}
    return json.loads(json.dumps({**kept, "after": after}, default=str))


def read_status(path: Path, wanted: Mapping[str, Any]) -> StageStatus:
    """Return the status in the file `path`, given the settings of now. Settings of another version are not compared."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        had, completion_id, seconds, before = (kept[name] for name in ("settings", "stamp", "seconds", "before"))
    except FileNotFoundError:
        return StageStatus("new")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} could not be read ({error}); delete it to run its stage again") from None
    names = [name for name in wanted if name in had and wanted[name] != had[name]]
    changes = tuple(
        "the stage before it ran again" if name == "after" else f"{name} {had[name]} → {wanted[name]}" for name in names
    )
    state = "changed" if names else "done" if completion_id else "in_progress"
    return StageStatus(state, changes, completion_id, 0.0 if names else seconds, before)


def run_if_needed(
    path: Path,
    wanted: Mapping[str, Any],
    line: ControlGroup,
    run_stage: Callable[[dict[str, bool]], None],
    *,
    run: Path | None = None,
    intact: Callable[[], bool] = lambda: True,
) -> StageStatus:
    """Run a stage unless it is done; return its status afterwards. A collective call.

    Args:
        path: its status file. wanted: its settings, from `settings`.
        run_stage: gets the settings `resume` and `overwrite` for a training stage, nothing for another.
        run: folder of the run that a training stage makes.
        intact: whether its result still exists; rank 0's answer counts.

    Raises:
        UserError: as `run_stage`; or a run of this name belongs to another command. The stage stays in progress.
    """
    status = describe_status(path, wanted, line, intact=intact)
    if status.state == "done":
        return status
    with raise_on_any_failure(line):
        flags = resume_flags(run, status) if run and line.rank == 0 else {}
        if line.rank == 0 and status.state != "in_progress":
            before = newest(run) if run else ""
            _write(path, {"settings": dict(wanted), "stamp": "", "seconds": 0.0, "before": before})
    flags = distributed.broadcast_object(flags, group=line)
    started, completion_id = time.perf_counter(), ""
    try:
        run_stage(flags)
        completion_id = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{uuid.uuid4().hex[:8]}"
    finally:
        if line.rank == 0:
            kept = json.loads(path.read_text("utf-8"))
            seconds = kept["seconds"] + time.perf_counter() - started
            _write(path, {**kept, "stamp": completion_id, "seconds": seconds})
    return describe_status(path, wanted, line, intact=intact)


def describe_status(
    path: Path, wanted: Mapping[str, Any], line: ControlGroup, *, intact: Callable[[], bool] = lambda: True
) -> StageStatus:
    """Return the status that rank 0 reads, on all ranks; a stage whose result is gone counts as changed."""
    with raise_on_any_failure(line):
        status = read_status(path, wanted) if line.rank == 0 else StageStatus("new")
        if status.state == "done" and line.rank == 0 and not intact():
            status = StageStatus("changed", ("its result is gone",))
    state, changes, *rest = distributed.broadcast_object(list(status), group=line)
    return StageStatus(state, tuple(changes), *rest)


def newest(run: Path) -> str:
    """Return an id of the newest checkpoint of a run; "" for none."""
    steps = checkpoint.steps(run / "checkpoints")
    if not steps:
        return ""
    header = checkpoint.read_header(run / "checkpoints" / str(steps[-1]))
    text = json.dumps([header["step"], header["state"], header["meta"].get("progress")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resume_flags(run: Path, status: StageStatus) -> dict[str, bool]:
    """Return the settings `resume` and `overwrite` for a training stage.

    A stage in progress resumes, unless only the older run that it replaces has been saved.

    Raises:
        UserError: a run of this name belongs to another command.
    """
    saved = newest(run)
    if status.state == "new" and saved:
        raise UserError(f"run {run} was made by another command: choose another name (--set name=…), or move it")
    again = status.state == "changed" or (status.state == "in_progress" and saved == status.before)
    return {"resume": status.state == "in_progress" and not again, "overwrite": bool(saved) and again}


def reasons(status: StageStatus, limit: int = 3) -> str:
    """Return why a changed stage runs again, in a line."""
    more = f" and {len(status.changes) - limit} more" if len(status.changes) > limit else ""
    return ", ".join(status.changes[:limit]) + more


def _write(path: Path, value: Mapping[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: could not be written: {error.strerror}") from None
