"""A run's folder as one value: settings, metrics, evaluations, and the metadata of its last checkpoint.

Reading it needs no model and no GPU, and works for a run that is still training or lacks any of its files.
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
    """What is on disk of one run."""

    name: str
    folder: Path
    stage: str  # base, mid, sft or rl
    step: int  # of the newest checkpoint, or the one that a child run started from; 0 if there is none
    steps: tuple[int, ...]  # of all checkpoints
    meta: Mapping[str, Any]  # of the checkpoint; {} without one
    settings: Mapping[str, Any]  # config.json, nested; {} if it is missing
    rows: Sequence[logger.Row]  # metrics.jsonl
    evaluations: Sequence[logger.Row]  # evaluations.jsonl, of this stage

    @property
    def shape(self) -> ModelConfig | None:
        """The model's config, or None without a checkpoint."""
        return ModelConfig(**self.meta["model"]) if self.meta.get("model") else None

    @property
    def last_step(self) -> int:
        """The last step on record, saved or not."""
        return max([self.step, *(row["step"] for row in self.rows[-1:])])

    @property
    def done(self) -> bool:
        """True if the newest checkpoint is the run's last."""
        return bool(self.meta.get("progress", {}).get("done")) or 0 < (self.meta.get("num_steps") or 0) <= self.step


def find_run(run: str | Path | None) -> Path:
    """Return the folder of a run by name or path, with or without a checkpoint; None: that of the newest checkpoint."""
    if run is None:
        return checkpoint.find_run()
    runs = checkpoint.runs_folder()
    for folder in (runs / run, Path(run).expanduser().absolute()):
        if any((folder / file).exists() for file in (logger.FILE, "config.json", "checkpoints")):
            return folder
    names = sorted(path.name for path in runs.glob("*") if path.is_dir())
    raise UserError(f"run={run}: no such run in {runs}{nearest(str(run), names)}")


def read_run(folder: Path, step: int | None = None) -> RunInfo:
    """Return what is in a run's folder.

    Args:
        step: of the checkpoint to describe; None: the newest. If it is gone, `meta` is the newest one's.
    """
    steps = checkpoint.steps(folder / "checkpoints")
    newest = step if step in steps else max(steps, default=None)
    meta = checkpoint.inspect(folder, newest).meta if newest is not None else {}
    config = folder / "config.json"
    try:
        settings = dict(json.loads(config.read_text("utf-8"))) if config.exists() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{config} cannot be read ({error}); delete it") from None
    stage = str(meta.get("stage", "base"))
    evaluations = [row for row in logger.read_evaluations(folder) if row["stage"] == stage]
    step = (newest or 0) if step is None else step
    return RunInfo(folder.name, folder, stage, step, tuple(steps), meta, settings, logger.read(folder), evaluations)


def ancestors(folder: Path) -> list[RunInfo]:
    """Return the run in `folder` and the runs it was made from, the oldest first, as far as they still exist."""
    runs = [read_run(folder)]
    while parent := runs[0].meta.get("parent"):  # {"run", "step", "stage"}
        name = Path(parent["run"]).name
        if any(run.name == name for run in runs):
            raise UserError(f"run {name} is its own ancestor: the metadata of {runs[0].folder} is wrong")
        sibling = runs[0].folder.with_name(name)  # runs that were moved were moved together
        if not sibling.is_dir():
            break
        runs.insert(0, read_run(sibling, parent["step"]))
    return runs


class Score(NamedTuple):
    """A metric's last value and step; `complete` if it comes from eval_base or eval_chat rather than from training."""

    value: float
    step: int
    complete: bool


def scores(run: RunInfo) -> dict[str, Score]:
    """Return the last value of each evaluation metric up to the run's step; for one step, evaluations.jsonl wins."""
    prefixes = ("val/", "core/", "chat/", "rl/pass_")
    latest: dict[str, Score] = {}
    rows = [(row["step"], row, False) for row in run.rows]
    rows += [(row["step"], row["metrics"], True) for row in run.evaluations]
    for step, values, complete in rows:
        if not run.step or step <= run.step:
            for name, x in values.items():
                if name.startswith(prefixes) and math.isfinite(x) and (name not in latest or latest[name].step <= step):
                    latest[name] = Score(x, step, complete)
    return latest


# What a run took, on all ranks together and forward and backward; None: it was not recorded.


def step_seconds(run: RunInfo) -> float | None:
    """Return the median time of a step, without evaluations and saving."""
    _, seconds = logger.curve(run.rows, "perf/step_seconds")
    return statistics.median(seconds[1:] or seconds) if seconds else None  # the first step compiles


def train_seconds(run: RunInfo) -> float | None:
    each = step_seconds(run)
    return None if each is None else each * run.last_step


def wall_seconds(run: RunInfo) -> float | None:
    """Return the time since the first step, evaluations included."""
    _, seconds = logger.curve(run.rows, "perf/wall_seconds")
    return seconds[-1] if seconds else None


def step_tokens(run: RunInfo) -> float | None:
    steps, tokens = logger.curve(run.rows, "train/tokens")
    return tokens[-1] / steps[-1] if steps else None


def step_flops(run: RunInfo) -> float | None:
    tokens, shape = step_tokens(run), run.shape
    return tokens * model.flops_per_token(shape) if tokens and shape else None
