"""500 damaged files through the readers of documents, conversations and tasks: each is read, or refused in a line."""

import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import tasks
from nanochat.config import UserError
from nanochat.data import DataConfig, sources
from nanochat.tasks.conversations import read_conversations

FILES = 500
TALK = [{"role": "user", "content": "Hi 😀\nthere"}, {"role": "assistant", "content": "Hello"}]
ODD = [None, 7, 1.5, "", "2024-03-01", "x" * 3000, "half \ud83d", "\0", [], ["a"], {"a": None}, True]
PIECES = [
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"[" * 3000,
    b'"',
    b"\n",
    b"\r",
    b"{}\n",
    b"NaN",
]
NAMES = ["x.jsonl", "x.jsonl.gz", "x.json", "X.JSON", "x.parquet", "x.csv", "x.txt"]
# Only damage to the whole file has no row.
PLACES = (
    r"(line|row) \d+|unreadable \w+ \(|two columns|holds \w+, not text|has no (column|rows)|no text column|expected a"
    r"|needs (at least )?two documents|no documents|no conversations"
)


def valid(name: str, draw: random.Random) -> bytes:
    """Return a file whose rows are documents, conversations and problems at once; some hold odd values."""
    rows = []
    for number in range(draw.choice([0, 1, 3, 8, 20])):
        row: dict[str, Any] = {"text": f"document {number} é", "messages": TALK, "question": "?", "answer": "#### 1"}
        rows.append(row | ({draw.choice(list(row)): draw.choice(ODD)} if draw.random() < 0.1 else {}))
    if name == "x.parquet":
        return parquet(rows, draw)
    if name == "x.csv":
        return ("text,question,answer\n" + 'a,"b\n""c""",#### 1\n' * len(rows)).encode()
    if name == "x.txt":
        return "A line, and\n\n  another é.\n".encode() * draw.choice([0, 1, 10, 1000])
    if draw.random() < 0.1:
        rows.insert(len(rows) // 2, draw.choice([TALK, "row", 7]))  # type: ignore[arg-type]
    if name == "x.json":
        return json.dumps(rows, indent=draw.choice([None, 1])).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    columns, names = [], []
    for name in ("text", "messages", "question", "answer"):
        values = [row[name] for row in rows]
        try:
            columns.append(pa.array(values))
        except (pa.ArrowException, UnicodeEncodeError):  # of several types, or half a character
            columns.append(
                pa.array([str(value).encode("utf-8", "surrogatepass") for value in values]).view(pa.string())
            )
        names.append(name if draw.random() < 0.95 else "text")
    file = io.BytesIO()
    pq.write_table(pa.table(columns, names=names), file, row_group_size=5, compression=draw.choice(["none", "snappy"]))
    return file.getvalue()


def damaged(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice([0, 1, 1, 2])):
        start = draw.randrange(len(data) + 1)
        end = start + draw.randrange(1, 200)
        data = draw.choice(
            [
                data[:start],
                data[:start] + data[end:],
                data[:end] + data[start:],
                data[:start] + bytes(end - start) + data[end:],
                data[:start] + draw.choice(PIECES) + data[start:],
                data[:start] + draw.randbytes(1) + data[start + 1 :],
                data[:-12] + draw.randbytes(12),  # where parquet and gzip have their lengths
                data.decode("utf-8", "replace").encode("utf-16"),
            ]
        )
    return data


def read_documents(path: Path) -> None:
    texts = [text for split in sources.SPLITS for text in sources.texts(DataConfig(source=str(path)), split)]
    assert all(text == text.encode().decode() != "" for text in texts)


def read_task(path: Path) -> None:
    task = tasks.load("gsm8k", source=path)
    assert all("messages" in task.row(i) for i in range(task.size))


@pytest.mark.parametrize("seed", range(10))
def test_damaged_file_is_read_or_refused_in_a_line(base: Path, seed: int) -> None:
    draw, refused = random.Random(seed), 0
    for number in range(FILES // 10):
        name = NAMES[number % len(NAMES)]
        path = base / "in" / str(number) / name
        path.parent.mkdir(parents=True)
        data = damaged(valid(name, draw), draw)
        path.write_bytes(damaged(gzip.compress(data, mtime=0), draw) if name.endswith("gz") else data)
        for read in (read_documents, read_conversations, read_task):
            try:
                read(path)
            except UserError as error:
                message, refused = str(error), refused + 1
                assert str(path) in message and "\n" not in message and re.search(PLACES, message), message
    assert 20 < refused < 3 * FILES // 10
