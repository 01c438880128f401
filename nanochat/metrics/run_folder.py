"""What a run has left on disk, as one value: its settings, metrics and evaluations, its last checkpoint's facts.

Reading it takes no model and no GPU, works beside a run that is under way, and for one that lacks any of its files.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import checkpoint, model
from nanochat.config import UserError, nearest
from nanochat.metrics import logger
from nanochat.model import ModelConfig

Curve = tuple[list[float], list[float]]


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """One run, as far as it is written down.

    Attributes:
        name, folder: of the run. stage: base, mid, sft or rl.
        step: of the newest checkpoint, or the one that a child run began with; 0 where none is saved.
        steps: of all checkpoints that are there.
        meta: what the checkpoint says beside its parameters; {} without one.
        settings: config.json, nested; {} where it is missing.
        rows: metrics.jsonl. evaluations: evaluations.jsonl, of this stage.
    """

    name: str
    folder: Path
    stage: str
    step: int
    steps: tuple[int, ...]
    meta: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[logger.Row]
    evaluations: Sequence[logger.EvaluationRow]

    @property
    def shape(self) -> ModelConfig | None:
        """The model's shape, or None where no checkpoint tells."""
        return ModelConfig(**self.meta["model"]) if self.meta.get("model") else None

    @property
    def last_step(self) -> int:
        """The last step that is known of, saved or not."""
        return max([self.step, *(row["step"] for row in self.rows[-1:])])

    @property
    def done(self) -> bool:
        """Whether the newest checkpoint is that of the run's end."""
        return bool(self.meta.get("progress", {}).get("done")) or 0 < (self.meta.get("num_steps") or 0) <= self.step

    @property
    def parent(self) -> Mapping[str, Any] | None:
        """Run, step and stage that this run began with, or None."""
        return self.meta.get("parent")


def find_run(run: str | Path | None) -> Path:
    """Return the folder of a run, with or without a checkpoint in it.

    Args:
        run: its name, or the path of its folder; None: the run that was saved last.

    Raises:
        UserError: there is none.
    """
    if run is None:
        return checkpoint.find_run()
    runs = checkpoint.runs_folder()
    for folder in (runs / run, Path(run).expanduser().absolute()):
        if (folder / logger.FILE).exists() or (folder / "config.json").exists() or (folder / "checkpoints").is_dir():
            return folder
    there = sorted(path.name for path in runs.glob("*") if path.is_dir())
    raise UserError(f"run={run}: no such run in {runs}{nearest(str(run), there)}")


def read_run(folder: Path, step: int | None = None) -> RunInfo:
    """Return what there is of the run in `folder`.

    Args:
        step: of the checkpoint to speak of; None: the newest. One that is gone leaves `meta` to the newest.

    Raises:
        UserError: a file is there and damaged.
    """
    steps = checkpoint.steps(folder / "checkpoints")
    newest = step if step in steps else max(steps, default=None)
    meta = checkpoint.read_header(folder / "checkpoints" / str(newest))["meta"] if newest is not None else {}
    config = folder / "config.json"
    try:
        settings = json.loads(config.read_text("utf-8")) if config.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{config} cannot be read ({error}); delete it") from None
    stage = str(meta.get("stage", "base"))
    found = [row for row in logger.read_evaluations(folder) if row["stage"] == stage]
    at = (newest or 0) if step is None else step
    return RunInfo(folder.name, folder, stage, at, tuple(steps), meta, settings, logger.read(folder), found)


def ancestors(folder: Path) -> list[RunInfo]:
    """Return the run in `folder` and what it was made from, the oldest first; an ancestor that is gone ends it.

    Raises:
        UserError: a file is there and damaged, or runs are each other's ancestors.
    """
    found = [read_run(folder)]
    while parent := found[0].parent:
        named = parent["run"]
        if any(one.name == Path(named).name for one in found):
            raise UserError(f"run {named} is its own ancestor: the metadata of {found[0].folder} is not right")
        beside = found[0].folder.with_name(Path(named).name)  # runs that were moved were moved together
        if not beside.is_dir():
            break
        found.insert(0, read_run(beside, parent["step"]))
    return found


class Score(NamedTuple):
    """A metric's last value: at which step, and whether it is from an evaluation made for its own sake."""

    value: float
    step: int
    whole: bool


def scores(record: RunInfo) -> dict[str, Score]:
    """Return the last value of each metric that is an evaluation's, up to the record's step.

    Those made on the way are in metrics.jsonl; of the same step, evaluations.jsonl counts.
    """
    named = ("val/", "core/", "chat/", "rl/pass_")
    found: dict[str, Score] = {}
    rows = [(row["step"], row, False) for row in record.rows]
    rows += [(row["step"], row["metrics"], True) for row in record.evaluations]
    for step, values, whole in rows:
        if not record.step or step <= record.step:
            for name, x in values.items():
                if name.startswith(named) and math.isfinite(x) and (name not in found or found[name].step <= step):
                    found[name] = Score(x, step, whole)
    return found


def step_seconds(record: RunInfo) -> float | None:
    """Return the median time of a step, or None where none is known: evaluations and saving are not in it."""
    seconds = [row["perf/step_seconds"] for row in record.rows if "perf/step_seconds" in row]
    return statistics.median(seconds[1:] or seconds) if seconds else None  # the first step compiles


def train_seconds(record: RunInfo) -> float | None:
    """Return the time that the steps have taken, by the median step."""
    each = step_seconds(record)
    return None if each is None else each * record.last_step


def wall_seconds(record: RunInfo) -> float | None:
    """Return the time since the run's first step, evaluations on the way included; None where it was not recorded."""
    return next((row["perf/wall_seconds"] for row in reversed(record.rows) if "perf/wall_seconds" in row), None)


def step_tokens(record: RunInfo) -> float | None:
    """Return the tokens of a step, all ranks together, or None where none is known."""
    found = [row["train/tokens"] / row["step"] for row in record.rows if row.get("train/tokens") and row["step"]]
    return found[-1] if found else None


def step_flops(record: RunInfo) -> float | None:
    """Return the FLOPs of a step, forward and backward, or None where no checkpoint tells the model's shape."""
    tokens, shape = step_tokens(record), record.shape
    return tokens * model.flops_per_token(shape) if tokens and shape else None
