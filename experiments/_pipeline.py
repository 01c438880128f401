"""Resumable pipelines: each stage has a status file with its settings. Rank 0 reads and writes it.

A finished stage is skipped and an interrupted one resumes. A stage whose settings changed, or that depends on a stage
that ran again, runs again.
"""

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import checkpoint, distributed, jsonl
from nanochat.config import UserError, flatten
from nanochat.text import format_duration

# Settings that change the result by rounding at most.
IGNORED = (
    *("resume", "overwrite", "dry_run", "device", "compile", "device_batch_size", "sharding.", "metrics."),
    *("checkpoint.", "download.", "slots", "batch_tokens", "train.chunk_tokens", "train.memory_budget"),
    *("train.attention", "data.token_cache", "data.prefetch_batches", "data.tokenizer_threads"),
    *("eval.every_steps", "eval.sample", "eval.prompts", "core.", "chat."),  # evaluations during the run
)


class StageStatus(NamedTuple):
    """The status of a stage."""

    state: str  # new, in_progress, done, or changed (started with other settings)
    changes: str = ""  # the first changed settings, as text
    completion_id: str = ""  # unique to each completion; "" before the first
    seconds: float = 0.0  # run time, summed over restarts
    before: str = ""  # id of the newest checkpoint when the stage started


def settings(config: Any, after: str = "") -> dict[str, Any]:
    """Return what determines the result: the settings by dotted name, and the completion that the stage depends on."""
    values = {name: value for name, value in flatten(config) if not name.startswith(IGNORED)}
    return json.loads(json.dumps({**values, "after": after}, default=str))


def read_status(path: Path, current: Mapping[str, Any]) -> StageStatus:
    """Return the status in a file, given the current settings; compare only settings that are in both."""
    try:
        saved = json.loads(path.read_text("utf-8"))
        old, completion_id, seconds, before = (saved[key] for key in ("settings", "stamp", "seconds", "before"))
        old, seconds = dict(old), float(seconds)
    except FileNotFoundError:
        return StageStatus("new")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} could not be read ({error}); delete it to run its stage again") from None
    changed = {name: f"{name} {old[name]} → {x}" for name, x in current.items() if old.get(name, x) != x}
    if "after" in changed:
        changed["after"] = "an earlier stage ran again"
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    state = "changed" if changed else "done" if completion_id else "in_progress"
    changes = ", ".join([*changed.values()][:3]) + more
    return StageStatus(state, changes, completion_id, 0.0 if changed else seconds, before)


def sync_status(
    path: Path, config: Any, *, after: str = "", has_output: Callable[[], bool] = lambda: True
) -> StageStatus:
    """Return the status that rank 0 reads, on all ranks; a done stage without its output counts as changed."""
    with distributed.raise_on_any_failure():
        status = StageStatus("new")
        if distributed.control_group().rank == 0:
            status = read_status(path, settings(config, after))
            if status.state == "done" and not has_output():
                status = StageStatus("changed", "its output is missing")
    return distributed.broadcast_object(status)


def run_if_needed(
    path: Path,
    config: Any,
    run: Callable[[Any], None],
    *,
    after: str = "",
    folder: Path | None = None,
    has_output: Callable[[], bool] = lambda: True,
) -> StageStatus:
    """Run a stage unless it is done; print which, and return its new status. A collective call.

    Args:
        path: the status file.
        run: called with `config`, for a training stage with `resume` and `overwrite` set.
        after: completion_id of the stage that this one depends on.
        folder: of the run, for a training stage.
        has_output: whether the stage's output still exists; called on rank 0.
    """
    status = sync_status(path, config, after=after, has_output=has_output)
    if status.state == "done":
        print(f"already done, in {format_duration(status.seconds)}", flush=True)
        return status
    if status.state == "changed":
        print(f"rerun: {status.changes}", flush=True)
    is_main, flags = distributed.control_group().rank == 0, {}
    with distributed.raise_on_any_failure():
        if is_main and folder:
            flags = resume_flags(folder, status)
        if is_main and status.state != "in_progress":
            before = latest_checkpoint_id(folder) if folder else ""
            _write(path, settings=settings(config, after), stamp="", seconds=0.0, before=before)
    config = dataclasses.replace(config, **distributed.broadcast_object(flags))
    start, completion_id = time.perf_counter(), ""
    try:
        run(config)
        completion_id = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{uuid.uuid4().hex[:8]}"
    finally:
        if is_main:
            saved = json.loads(path.read_text("utf-8"))
            seconds = saved["seconds"] + time.perf_counter() - start
            _write(path, **{**saved, "stamp": completion_id, "seconds": seconds})
    distributed.hardware.release_memory()
    return sync_status(path, config, after=after, has_output=has_output)


def latest_checkpoint_id(run: Path) -> str:
    """Return an id of the newest checkpoint of a run; "" if there is none."""
    if not checkpoint.steps(run / "checkpoints"):
        return ""
    info = checkpoint.inspect(run)
    text = json.dumps([info.step, info.state, info.meta.get("progress")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resume_flags(run: Path, status: StageStatus) -> dict[str, bool]:
    """Return the settings `resume` and `overwrite` for a training stage.

    A stage in progress resumes if it has saved a checkpoint; before that, it overwrites the older run.
    """
    latest = latest_checkpoint_id(run)
    if status.state == "new" and latest:
        raise UserError(f"run {run} was made by another command: choose another name (--set name=…), or move it")
    restart = status.state == "changed" or (status.state == "in_progress" and latest == status.before)
    return {"resume": status.state == "in_progress" and not restart, "overwrite": bool(latest) and restart}


def _write(path: Path, **status: Any) -> None:
    jsonl.write_atomic(path, json.dumps(status, indent=1) + "\n")
