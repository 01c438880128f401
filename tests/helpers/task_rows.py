"""Rows of tasks for tests: what they ask, what they answer, and files of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data import Conversation, Tokenizer

DATA = Path(__file__).parents[1] / "data"
ROWS = DATA / "tasks"
TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))


def question(row: Conversation) -> str:
    return row["messages"][0]["content"]


def reference(row: Conversation) -> Any:
    return row["messages"][-1]["content"]


def write(path: Path, *rows: Any) -> Path:
    """Write rows as jsonl or parquet, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
