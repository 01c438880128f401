"""The record of a run: metrics.jsonl and config.json, always; TensorBoard and wandb, on request.

metrics.jsonl holds one object a line, {"step": 120, "loss": 4.123, ...}, with units in the names. JSON has no NaN
and no infinity: they are written as the strings "nan", "inf" and "-inf", and `read` makes them floats again.
The file is good at any moment: a process killed in the middle of a line leaves a torn last line, which `read` leaves
out and the next `open` cuts off.

The record of evaluations made after training: <run folder>/evaluations.jsonl, one object a line.

    {"time": "2026-07-01T12:00:00+00:00", "step": 600, "stage": "base", "metrics": {"core/CORE": 0.2}, "failed": {}}

What is evaluated along the way is in the run's metrics.jsonl; this is for what a later process finds out. A process
killed in the middle of a line leaves a torn last line, which `read` leaves out and the next `append` cuts off.
"""

import contextlib
import dataclasses
import datetime
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from nanochat.config import UserError, flatten

FILE = "metrics.jsonl"
Row = dict[str, Any]


class Log(NamedTuple):
    """An open record, made by `open`; all fields are None where nothing is recorded (ranks other than 0)."""

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
    """Open the record in `folder`, which is made if need be, and write `config` to config.json.

    Args:
        resume_step: go on after this step: lines of later steps are dropped, so that the file becomes that of a run
            that never stopped. None starts anew; a record that is there already is kept as metrics.1.jsonl (or .2, …).
        tensorboard, wandb: see `MetricsConfig`.
        config: the resolved configuration, a dataclass.
        enabled: False gives a log that records nothing.

    Raises:
        UserError: the folder cannot be written, a line of the record is damaged, or a package is missing.
    """
    if not enabled:
        return Log(None)
    folder = Path(folder)
    path = folder / FILE
    # Packages first: a missing one must not touch the record.
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
            _replace(path, "".join(kept))
        file = path.open("a", encoding="utf-8")
    writer = run = None
    if summary_writer:
        purge = None if resume_step is None else resume_step + 1
        writer = summary_writer(str(folder / "tensorboard"), purge_step=purge)
    if wandb_package:
        run = _wandb_run(wandb_package, folder, str(wandb), config, resume_step is not None)
    return Log(file, writer, run)


def write(log: Log, step: int, values: Mapping[str, float]) -> None:
    """Record `values` at `step`.

    Args:
        step: optimizer steps done.
        values: name -> number; 0-d tensors are read.

    Raises:
        UserError: the disk is full or cannot be written.
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
    """Close the record; closing twice does no harm."""
    if log.file is not None:
        with _explained(Path(log.file.name)):
            log.file.close()
    if log.tensorboard is not None:
        log.tensorboard.close()
    if log.wandb is not None:
        log.wandb.finish()


def read(folder: Path) -> list[Row]:
    """Return the lines of the record in `folder` as {"step": n, name: number}, in order; [] where there is none.

    Raises:
        UserError: a line other than a torn last one is no JSON object with a step.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # the last is empty, or torn
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
            rows.append({name: float(x) if isinstance(x, str) else x for name, x in row.items()})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a line of metrics; delete that line") from None
    return rows


def curve(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of the metric `name`, of the rows that have it."""
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [row[name] for row in having]


def write_config(folder: Path, config: Any) -> None:
    """Write a configuration (a dataclass) to config.json, in one piece; paths, dtypes and the like as strings."""
    text = json.dumps(_jsonable(dataclasses.asdict(config)), indent=2)
    _replace(Path(folder) / "config.json", f"{text}\n")


def ema(previous: Sequence[float] | None, value: float, beta: float = 0.9) -> tuple[tuple[float, float], float]:
    """Return (state, debiased mean) of an exponential moving average after one more value.

    mean <- beta mean + (1 - beta) value; weight <- beta weight + (1 - beta); debiased = mean / weight.

    Args:
        previous: the state, (mean, weight), or None at the start. value: left out where it is not finite.
    """
    mean, weight = previous or (0.0, 0.0)
    if math.isfinite(value):
        mean, weight = beta * mean + (1 - beta) * value, beta * weight + (1 - beta)
    return (mean, weight), mean / weight if weight else math.nan


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: tensors on CUDA, the whole process on CPU.

    MPS keeps no peak: there it is what the driver holds now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # Linux tells of this process alone; what getrusage tells starts at the peak of the process that started this one.
    status = Path("/proc/self/status")
    if found := status.exists() and re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE):
        return int(found[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes, except on macOS


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


def _replace(path: Path, text: str) -> None:
    """Put `text` in the place of `path` such that a reader, or a crash, sees the old text or the new."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a line that a person can act upon."""
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
    # A resumed run goes on under its old id; steps that are done again overwrite nothing, hence our own x axis.
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
    _replace(id_file, f"{run.id}\n")
    return run


EVALUATIONS_FILE = "evaluations.jsonl"
EvaluationRow = dict[str, Any]


def append_evaluation(
    folder: Path, step: int, stage: str, metrics: Mapping[str, float], failed: Mapping[str, str] | None = None
) -> None:
    """Add one evaluation to the record of the run in `folder`.

    Args:
        folder: of the run. step: of the checkpoint. stage: base, mid, sft or rl.
        metrics: name -> number. failed: what could not be evaluated -> the reason.

    Raises:
        UserError: the file cannot be written.
        ValueError: a number is not finite; JSON has none such, and an evaluation without a value belongs in `failed`.
    """
    numbers = {name: int(x) if isinstance(x, int) else float(x) for name, x in metrics.items()}
    wrong = [name for name, x in numbers.items() if not math.isfinite(x)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {numbers[wrong[0]]}: not a number to record")
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"time": time, "step": int(step), "stage": stage, "metrics": numbers, "failed": dict(failed or {})}
    path = Path(folder) / EVALUATIONS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell():
                whole = path.read_bytes().rfind(b"\n") + 1
                if whole < file.tell():
                    file.truncate(whole)
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def read_evaluations(folder: Path) -> list[EvaluationRow]:
    """Return the evaluations of the run in `folder`, in the order in which they were made; [] where there are none.

    Raises:
        UserError: a line other than a torn last one is no evaluation (with its number).
    """
    path = Path(folder) / EVALUATIONS_FILE
    try:
        lines = path.read_bytes().split(b"\n")  # the last is empty, or torn
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["metrics"], dict):
                raise TypeError
            head = {"time": str(row["time"]), "step": int(row["step"]), "stage": str(row["stage"])}
            rows.append(head | {"metrics": row["metrics"], "failed": dict(row["failed"])})
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a line of evaluations; delete that line") from None
    return rows


def latest_evaluation(folder: Path, stage: str | None = None) -> dict[str, float]:
    """Return for each metric its last recorded value: of that stage, or of all. Raises: UserError, as `read`."""
    found: dict[str, float] = {}
    for row in read_evaluations(folder):
        if stage is None or row["stage"] == stage:
            found |= row["metrics"]
    return found
