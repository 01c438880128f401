"""Results of single tasks: kept on disk as they are finished, so that the same command resumes, and printed."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat import distributed, jsonl
from nanochat.checkpoint import CheckpointInfo
from nanochat.data import Tokenizer
from nanochat.text import table_row

WIDTHS = (40, 8, 8, 24)  # of name, accuracy, centered accuracy, and how it came about


def key(*values: Any) -> str:
    """Return a hash of everything that decides a result."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def model_key(info: CheckpointInfo, tok: Tokenizer, dtype: torch.dtype) -> list[Any]:
    """Return what identifies a model: that of a checkpoint, computed in a dtype."""
    leaves = {name: leaf["fingerprint"] for name, leaf in info.state.items() if name.startswith("params.")}
    return [leaves, tok.fingerprint, str(dtype)]


def read_finished(path: Path, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return name -> result of what an earlier process appended to a jsonl file, each with its "key". Collective."""
    finished: dict[str, dict[str, Any]] = {}
    with distributed.raise_on_any_failure():
        if distributed.control_group().rank == 0:
            rows = [row for _, row in jsonl.read(path, missing_ok=True, drop_partial=True)]
            by_key = {row.pop("key", None): row for row in rows}
            finished = {name: by_key[key] for name, key in keys.items() if key in by_key}
            if rows and not finished:
                print(f"{path} is of another checkpoint or other settings: its results are ignored")
    return distributed.broadcast_object(finished)


def line(name: str, accuracy: float, centered: float, status: str) -> str:
    """Return a result as a row of the printed table."""
    return table_row([name, f"{accuracy:.2%}", f"{centered:.4f}", status], WIDTHS)


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as CSV, floats with six digits."""
    text = io.StringIO()
    cells = [[f"{x:.6f}" if isinstance(x, float) else x for x in row] for row in rows]
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue()
