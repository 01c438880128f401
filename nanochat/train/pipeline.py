"""What is finished already, and with which settings: a small file for each piece of a longer work.

A piece that is finished with the same settings is skipped; one that was begun with them goes on where it stopped; one
whose settings have changed, or that follows on one that was done again, is done again. All ranks see the same, for
rank 0 looks and tells.
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

# Settings that say how something is done, and change nothing of what comes out (but for rounding).
HOW = (
    *("resume", "overwrite", "dry_run", "device", "compile", "device_batch_size", "sharding.", "metrics."),
    *("checkpoint.", "download.", "slots", "batch_tokens", "train.chunk_tokens", "train.memory_budget"),
    *("train.attention", "data.token_cache", "data.prefetch_batches", "data.tokenizer_threads"),
    *("eval.every_steps", "eval.sample", "eval.prompts", "core.", "chat."),  # what is looked at on the way
)


class StageStatus(NamedTuple):
    """Where a piece of work stands.

    Attributes:
        state: new; begun, with the settings of now; done, with them; or changed: done or begun with others.
        changes: in words, of the last. stamp: of the time it was finished, new with each; "" before.
        seconds: that it took, all starts together. before: what of an older run was there as it began.
    """

    state: str
    changes: tuple[str, ...] = ()
    stamp: str = ""
    seconds: float = 0.0
    before: str = ""


def settings(config: Any, after: str = "") -> dict[str, Any]:
    """Return what the outcome of a configuration depends on, by dotted name, as JSON holds it.

    Args:
        config: a dataclass. after: the stamp of what comes before it.
    """
    kept = {name: value for name, value in flatten(config) if not name.startswith(HOW)}
    return json.loads(json.dumps({**kept, "after": after}, default=str))


def read_status(path: Path, wanted: Mapping[str, Any]) -> StageStatus:
    """Return where the piece whose file is `path` stands, given the settings that are wanted now.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        kept = json.loads(path.read_text("utf-8"))
        had, stamp, seconds, before = kept["settings"], kept["stamp"], kept["seconds"], kept["before"]
    except FileNotFoundError:
        return StageStatus("new")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and what it speaks of is done again") from None
    names = [name for name in {**wanted, **had} if wanted.get(name) != had.get(name)]
    changes = tuple(
        "what it follows on was done again" if name == "after" else f"{name} {had.get(name)} → {wanted.get(name)}"
        for name in names
    )
    state = "changed" if names else "done" if stamp else "begun"
    return StageStatus(state, changes, stamp, 0.0 if names else seconds, before)


def run_if_needed(
    path: Path,
    wanted: Mapping[str, Any],
    line: ControlGroup,
    do: Callable[[dict[str, bool]], None],
    *,
    run: Path | None = None,
    intact: Callable[[], bool] = lambda: True,
) -> StageStatus:
    """Do a piece of work, unless it is done; return where it stands afterwards. All ranks call this together.

    Args:
        path: its file. wanted: its settings, from `settings`. line: the ranks.
        do: does it; gets `resume` and `overwrite` for a training stage (see `opening`), nothing for anything else.
        run: folder of the run that a training stage makes.
        intact: whether what it made is still there; rank 0's answer counts.

    Raises:
        UserError: as `do` does; or there is a run of this name that is not of this work. The piece stays begun.
    """
    standing = describe_status(path, wanted, line, intact=intact)
    if standing.state == "done":
        return standing
    with raise_on_any_failure(line):
        opened = resume_flags(run, standing) if run and line.rank == 0 else {}
        if line.rank == 0 and standing.state != "begun":
            before = newest(run) if run else ""
            _write(path, {"settings": dict(wanted), "stamp": "", "seconds": 0.0, "before": before})
    opened = distributed.broadcast_object(opened, group=line)
    started, stamp = time.perf_counter(), ""
    try:
        do(opened)
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{uuid.uuid4().hex[:8]}"
    finally:
        if line.rank == 0:
            kept = json.loads(path.read_text("utf-8"))
            seconds = kept["seconds"] + time.perf_counter() - started
            _write(path, {**kept, "stamp": stamp, "seconds": seconds})
    return describe_status(path, wanted, line, intact=intact)


def describe_status(
    path: Path, wanted: Mapping[str, Any], line: ControlGroup, *, intact: Callable[[], bool] = lambda: True
) -> StageStatus:
    """Return where a piece stands, as rank 0 sees it, on all ranks; one whose outcome is gone counts as changed."""
    with raise_on_any_failure(line):
        found = read_status(path, wanted) if line.rank == 0 else StageStatus("new")
        if found.state == "done" and line.rank == 0 and not intact():
            found = StageStatus("changed", ("what it made is gone",))
    state, changes, *rest = distributed.broadcast_object(list(found), group=line)
    return StageStatus(state, tuple(changes), *rest)


def newest(run: Path) -> str:
    """Return a name for the newest checkpoint of a run, different for each that was ever written; "" for none."""
    steps = checkpoint.steps(run / "checkpoints")
    if not steps:
        return ""
    header = checkpoint.read_header(run / "checkpoints" / str(steps[-1]))
    text = json.dumps([header["step"], header["state"], header["meta"].get("progress")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resume_flags(run: Path, standing: StageStatus) -> dict[str, bool]:
    """Return the settings `resume` and `overwrite` with which a training stage has to be started.

    A run that was begun goes on, unless all that is there is still the older one which it was to replace.

    Raises:
        UserError: there is a run of this name that is not of this work.
    """
    there = newest(run)
    if standing.state == "new" and there:
        raise UserError(
            f"run {run} is there already and is not of this: choose another name (--set name=…), or move it"
        )
    again = standing.state == "changed" or (standing.state == "begun" and there == standing.before)
    return {"resume": standing.state == "begun" and not again, "overwrite": bool(there) and again}


def reasons(standing: StageStatus, most: int = 3) -> str:
    """Return why a changed piece is done again, in a line."""
    more = f" and {len(standing.changes) - most} more" if len(standing.changes) > most else ""
    return ", ".join(standing.changes[:most]) + more


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
        raise UserError(f"{error.filename or path}: cannot be written: {error.strerror}") from None
