"""The record of evaluations made after training: <run folder>/evaluations.jsonl, one object a line.

    {"time": "2026-07-01T12:00:00+00:00", "step": 600, "stage": "base", "metrics": {"core/CORE": 0.2}, "failed": {}}

What is evaluated along the way is in the run's metrics.jsonl; this is for what a later process finds out. A process
killed in the middle of a line leaves a torn last line, which `read` leaves out and the next `append` cuts off.
"""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat.config import UserError

FILE = "evaluations.jsonl"
Row = dict[str, Any]


def append(
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
    path = Path(folder) / FILE
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


def read(folder: Path) -> list[Row]:
    """Return the evaluations of the run in `folder`, in the order in which they were made; [] where there are none.

    Raises:
        UserError: a line other than a torn last one is no evaluation (with its number).
    """
    path = Path(folder) / FILE
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


def latest(folder: Path, stage: str | None = None) -> dict[str, float]:
    """Return for each metric its last recorded value: of that stage, or of all. Raises: UserError, as `read`."""
    found: dict[str, float] = {}
    for row in read(folder):
        if stage is None or row["stage"] == stage:
            found |= row["metrics"]
    return found
