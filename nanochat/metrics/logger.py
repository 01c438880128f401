"""What a run records: metrics.jsonl and config.json always, TensorBoard and wandb on request; evaluations.jsonl.

metrics.jsonl holds one object per line, {"step": 120, "train/loss": 4.123, ...}, with units in the names. NaN and the
infinities, which JSON does not have, are written as the strings "nan", "inf" and "-inf", and read back as floats.
evaluations.jsonl holds what later processes measured of a checkpoint:

    {"time": "2026-07-01T12:00:00+00:00", "step": 600, "stage": "base", "metrics": {"core/CORE": 0.2}, "failed": {}}

Both files are valid at any moment: a partial last line, left by a killed process, is ignored and later removed.
"""

import dataclasses
import datetime
import importlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import jsonl
from nanochat.config import UserError, flatten
from nanochat.text import reason

FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
Row = dict[str, Any]


class Log(NamedTuple):
    """Where metrics go; all None on ranks other than 0, which record nothing."""

    path: Path | None
    tensorboard: Any = None
    wandb: Any = None


def open_log(
    folder: Path,
    *,
    resume_step: int | None = None,
    rows_from: Path | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    config: Any = None,
    enabled: bool = True,
) -> Log:
    """Open the metrics of a run, creating its folder, and write `config` (a dataclass) to config.json.

    Args:
        resume_step: continue after this step and drop the lines of later ones, so that the file becomes that of a run
            that never stopped. None starts a new file; an existing one is kept as metrics.1.jsonl (or .2, ...).
        rows_from: start a new file with the lines up to that step of the run in this folder.
        enabled: False records nothing.
    """
    if not enabled:
        return Log(None)
    path = folder / FILE
    # Packages first: if one is missing, the files stay as they are.
    summary_writer = _need("torch.utils.tensorboard").SummaryWriter if tensorboard else None
    wandb_package = _need("wandb") if wandb else None
    kept = [] if resume_step is None else [row for row in read(rows_from or folder) if row["step"] <= resume_step]
    if config is not None:
        text = json.dumps(_jsonable(dataclasses.asdict(config)), indent=2)
        jsonl.write_atomic(folder / "config.json", f"{text}\n")
    if (resume_step is None or rows_from) and path.exists() and path.stat().st_size:
        number = 1
        while (old := path.with_name(f"metrics.{number}.jsonl")).exists():
            number += 1
        try:
            path.rename(old)
        except OSError as error:
            raise UserError(f"{path} cannot be renamed to {old.name}: {reason(error)}") from None
    jsonl.write_atomic(path, "".join(json.dumps(_jsonable(row), ensure_ascii=False) + "\n" for row in kept))
    purge_step = None if resume_step is None else resume_step + 1
    writer = summary_writer and summary_writer(str(folder / "tensorboard"), purge_step=purge_step)
    run = wandb_package and _wandb_run(wandb_package, folder, str(wandb), config, resume_step is not None)
    return Log(path, writer, run)


def start_reading(metrics: Mapping[str, Any]) -> Callable[[], tuple[dict[str, float], float]]:
    """Start one copy of 0-d tensors (and numbers) to the host; the result waits for it, not for what is launched later.

    It returns the numbers, and the time.perf_counter() at which they were there.
    """
    import torch

    tensors = {name: x.float() for name, x in metrics.items() if isinstance(x, torch.Tensor)}
    stacked = torch.stack([*tensors.values()]) if tensors else torch.empty(0)
    on_host = stacked.to("cpu", non_blocking=stacked.is_cuda)  # in pinned memory
    event, ready = torch.cuda.current_stream().record_event() if stacked.is_cuda else None, time.perf_counter()

    def read() -> tuple[dict[str, float], float]:
        if event:
            event.synchronize()
        numbers = {name: float(x) for name, x in {**metrics, **dict(zip(tensors, on_host.tolist()))}.items()}
        return numbers, time.perf_counter() if event else ready

    return read


def write(log: Log, step: int, values: Mapping[str, float]) -> None:
    """Record numbers (0-d tensors included) after `step` optimizer steps."""
    if log.path is None:
        return
    numbers = {name: int(x) if isinstance(x, int) else float(x) for name, x in values.items()}
    jsonl.append(log.path, _jsonable({"step": step, **numbers}), sync=False)
    if log.tensorboard is not None:
        for name, number in numbers.items():
            log.tensorboard.add_scalar(name, number, step)
    if log.wandb is not None:
        log.wandb.log({"step": step, **numbers})


def close(log: Log) -> None:
    """Let the trackers finish; closing twice is fine."""
    if log.tensorboard is not None:
        log.tensorboard.close()
    if log.wandb is not None:
        log.wandb.finish()


def read(folder: Path) -> list[Row]:
    """Return the lines of metrics.jsonl as {"step": n, name: number}, in order; [] if there is no such file."""

    def parse(row: Row) -> Row:
        return {name: float(x) if isinstance(x, str) else x for name, x in row.items()} | {"step": int(row["step"])}

    return _read(folder / FILE, parse)


def _read(path: Path, parse: Callable[[Row], Row]) -> list[Row]:
    rows, number = [], 0
    try:
        for number, row in jsonl.read(path, missing_ok=True, drop_partial=True):  # noqa: B007 (the error names it)
            rows.append(parse(row))
    except (jsonl.InvalidLineError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        number = getattr(error, "number", number)
        raise UserError(f"{path}:{number}: not a line of {path.stem}; delete that line") from None
    return rows


def curve(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of a metric, from the rows that have it."""
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [row[name] for row in having]


def ema(previous: Sequence[float] | None, value: float, beta: float = 0.9) -> tuple[tuple[float, float], float]:
    """Return (state, debiased mean) of an exponential moving average after one more value.

    mean <- beta mean + (1 - beta) value; weight <- beta weight + (1 - beta); debiased = mean / weight.
    A value that is not finite is ignored.
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


def _jsonable(value: Any) -> Any:
    """Return a JSON value: what JSON does not have (paths, dtypes, NaN) as strings."""
    if isinstance(value, dict):
        return {str(name): _jsonable(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, str | int | None) else str(value)


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
    folder: Path, step: int, stage: str, metrics: Mapping[str, float], failed: Mapping[str, str] = {}, **more: str
) -> None:
    """Add one evaluation of a checkpoint to a run's evaluations.jsonl; `failed`: what could not be evaluated -> why."""
    numbers = {name: int(x) if isinstance(x, int) else float(x) for name, x in metrics.items()}
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"time": time, "step": int(step), "stage": stage, "metrics": numbers, "failed": dict(failed)}
    jsonl.append(folder / EVALUATIONS_FILE, row | more)


def read_evaluations(folder: Path) -> list[Row]:
    """Return a run's evaluations, the oldest first; [] if there are none."""

    def parse(row: Row) -> Row:
        head = {"time": str(row["time"]), "step": int(row["step"]), "stage": str(row["stage"])}
        return head | {"metrics": dict(row["metrics"]), "failed": dict(row["failed"])}

    return _read(folder / EVALUATIONS_FILE, parse)
