"""What a run records: metrics.jsonl and config.json always, TensorBoard and wandb on request; evaluations.jsonl.

metrics.jsonl holds one object per line, {"step": 120, "train/loss": 4.123, ...}, with units in the names. NaN and the
infinities, which JSON does not have, are written as the strings "nan", "inf" and "-inf", and read back as floats.
evaluations.jsonl holds what later processes measured of a checkpoint:

    {"time": "2026-07-01T12:00:00+00:00", "step": 600, "stage": "base", "metrics": {"core/CORE": 0.2}, "failed": {}}

Both files are valid at any moment: a partial last line, left by a killed process, is ignored and later removed.
"""

import contextlib
import dataclasses
import datetime
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanochat import jsonl
from nanochat.config import UserError, flatten

FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
Row = dict[str, Any]
EvaluationRow = dict[str, Any]


class Log(NamedTuple):
    """Open metrics files; all fields are None on ranks other than 0, which record nothing."""

    file: IO[str] | None
    tensorboard: Any = None
    wandb: Any = None


def open_log(
    folder: Path,
    *,
    resume_step: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    config: Any = None,
    enabled: bool = True,
) -> Log:
    """Open the metrics of a run, creating its folder, and write `config` (a dataclass) to config.json.

    Args:
        resume_step: continue after this step and drop the lines of later ones, so that the file becomes that of a run
            that never stopped. None starts a new file; an existing one is kept as metrics.1.jsonl (or .2, ...).
        tensorboard, wandb: see `MetricsConfig`.
        enabled: False records nothing.

    Raises:
        UserError: the folder cannot be written, a line of the file is corrupt, or a package is missing.
    """
    if not enabled:
        return Log(None)
    folder = Path(folder)
    path = folder / FILE
    # Packages first: if one is missing, the files stay as they are.
    summary_writer = _need("torch.utils.tensorboard").SummaryWriter if tensorboard else None
    wandb_package = _need("wandb") if wandb else None
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if config is not None:
            write_config(folder, config)
        if resume_step is None:
            _set_aside(path)
        elif path.exists():
            kept = [_line(row) for row in read(folder) if row["step"] <= resume_step]
            jsonl.write_atomic(path, "".join(kept))
        file = path.open("a", encoding="utf-8")
    writer = run = None
    if summary_writer:
        purge = None if resume_step is None else resume_step + 1
        writer = summary_writer(str(folder / "tensorboard"), purge_step=purge)
    if wandb_package:
        run = _wandb_run(wandb_package, folder, str(wandb), config, resume_step is not None)
    return Log(file, writer, run)


def write(log: Log, step: int, values: Mapping[str, float]) -> None:
    """Record numbers (0-d tensors included) after `step` optimizer steps.

    Raises:
        UserError: the file cannot be written.
    """
    if log.file is None:
        return
    if "step" in values:
        raise ValueError("a metric cannot be called step")
    numbers = {name: int(x) if isinstance(x, int) else float(x) for name, x in values.items()}
    with _explained(Path(log.file.name)):
        log.file.write(_line({"step": step, **numbers}))
        log.file.flush()
    if log.tensorboard is not None:
        for name, number in numbers.items():
            log.tensorboard.add_scalar(name, number, step)
    if log.wandb is not None:
        log.wandb.log({"step": step, **numbers})


def close(log: Log) -> None:
    """Close all files; closing twice is fine."""
    if log.file is not None:
        with _explained(Path(log.file.name)):
            log.file.close()
    if log.tensorboard is not None:
        log.tensorboard.close()
    if log.wandb is not None:
        log.wandb.finish()


def read(folder: Path) -> list[Row]:
    """Return the lines of metrics.jsonl as {"step": n, name: number}, in order; [] if there is no such file.

    Raises:
        UserError: a line is not an object with a step.
    """
    return _read(Path(folder) / FILE, _metrics_row, "metrics")


def _metrics_row(row: Any) -> Row:
    row["step"] = int(row["step"])
    return {name: float(x) if isinstance(x, str) else x for name, x in row.items()}


def _read(path: Path, check: Callable[[Any], Row], what: str) -> list[Row]:
    rows = []
    try:
        lines = jsonl.read(path, missing_ok=True, drop_partial=True)
    except jsonl.InvalidLineError as error:
        raise UserError(f"{path}:{error.number}: not a line of {what}; delete that line") from None
    for number, row in lines:
        try:
            rows.append(check(row))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a line of {what}; delete that line") from None
    return rows


def curve(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of a metric, from the rows that have it."""
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [row[name] for row in having]


def write_config(folder: Path, config: Any) -> None:
    """Write a configuration (a dataclass) to config.json atomically; paths, dtypes and the like as strings."""
    text = json.dumps(_jsonable(dataclasses.asdict(config)), indent=2)
    jsonl.write_atomic(Path(folder) / "config.json", f"{text}\n")


def ema(previous: Sequence[float] | None, value: float, beta: float = 0.9) -> tuple[tuple[float, float], float]:
    """Return (state, debiased mean) of an exponential moving average after one more value.

    mean <- beta mean + (1 - beta) value; weight <- beta weight + (1 - beta); debiased = mean / weight.

    Args:
        previous: the state, (mean, weight), or None at the start. value: ignored if it is not finite.
    """
    mean, weight = previous or (0.0, 0.0)
    if math.isfinite(value):
        mean, weight = beta * mean + (1 - beta) * value, beta * weight + (1 - beta)
    return (mean, weight), mean / weight if weight else math.nan


def smoothed(values: Iterable[float]) -> list[float]:
    """Return the moving average after each value."""
    state, means = None, []
    for value in values:
        state, mean = ema(state, value)
        means.append(mean)
    return means


def _line(row: Row) -> str:
    return json.dumps(_jsonable(row), allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _jsonable(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, str | int | None) else str(value)


def _set_aside(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        number = 1
        while (old := path.with_name(f"metrics.{number}.jsonl")).exists():
            number += 1
        path.rename(old)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot write the metrics: {error.strerror}") from None


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f'the package {error.name} is missing: pip install -e ".[track]"') from None


def _wandb_run(package: Any, folder: Path, project: str, config: Any, resume: bool) -> Any:
    # A resumed run keeps its id. Steps that are repeated overwrite nothing, hence an x axis of our own.
    id_file = folder / "wandb_id.txt"
    old = id_file.read_text("utf-8").strip() if resume and id_file.exists() else None
    run = package.init(
        project=project,
        dir=str(folder),
        id=old,
        resume="allow" if old else None,
        config=None if config is None else {name: _jsonable(x) for name, x in flatten(config)},
    )
    run.define_metric("*", step_metric="step")
    jsonl.write_atomic(id_file, f"{run.id}\n")
    return run


def append_evaluation(
    folder: Path, step: int, stage: str, metrics: Mapping[str, float], failed: Mapping[str, str] | None = None
) -> None:
    """Add one evaluation of a checkpoint to a run's evaluations.jsonl.

    Args:
        stage: base, mid, sft or rl. failed: what could not be evaluated -> the reason.

    Raises:
        UserError: the file cannot be written.
        ValueError: a number is not finite; what has no value belongs in `failed`.
    """
    numbers = {name: int(x) if isinstance(x, int) else float(x) for name, x in metrics.items()}
    wrong = [name for name, x in numbers.items() if not math.isfinite(x)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {numbers[wrong[0]]}: not a number to record")
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"time": time, "step": int(step), "stage": stage, "metrics": numbers, "failed": dict(failed or {})}
    jsonl.append(Path(folder) / EVALUATIONS_FILE, row)


def read_evaluations(folder: Path) -> list[EvaluationRow]:
    """Return a run's evaluations in the order in which they were made; [] if there are none.

    Raises:
        UserError: a line is not an evaluation.
    """
    return _read(Path(folder) / EVALUATIONS_FILE, _evaluation_row, "evaluations")


def _evaluation_row(row: Any) -> EvaluationRow:
    if not isinstance(row["metrics"], dict):
        raise TypeError
    head = {"time": str(row["time"]), "step": int(row["step"]), "stage": str(row["stage"])}
    return head | {"metrics": row["metrics"], "failed": dict(row["failed"])}


def latest_evaluation(folder: Path, stage: str | None = None) -> dict[str, float]:
    """Return the last recorded value of each metric, of one stage or of all; raises as `read_evaluations`."""
    latest: dict[str, float] = {}
    for row in read_evaluations(folder):
        if stage is None or row["stage"] == stage:
            latest |= row["metrics"]
    return latest
