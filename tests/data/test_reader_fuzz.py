"""500 damaged files through the readers of documents, conversations and tasks: each is read, or refused in a line."""

import gzip
import io
import json
import random
import re
from collections.abc import Callable
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
ODD = [None, 7, 1.5, "", "2024-03-01", "x" * 3000, "half \ud83d", "\0", [], ["a"], {"a": None}, True, b"\xff".hex()]
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
# Of damage to a row the number is told; of damage to the whole file there is none.
WHOLE_FILE = (
    r"unreadable \w+ \(|has no|no text column|two columns|needs? (at least )?two documents|no documents|no conver"
)


def rows(draw: random.Random) -> list[Any]:
    """Rows that are documents, conversations and problems at once; some with odd values, or no rows at all."""
    made: list[Any] = []
    for number in range(draw.choice([0, 1, 3, 8, 20])):
        row: dict[str, Any] = {"text": f"document {number} é", "messages": TALK, "question": "?", "answer": "#### 1"}
        if draw.random() < 0.1:
            row[draw.choice(list(row))] = draw.choice(ODD)
        made.append(
            draw.choice([row, row, row, row, row, row, row, row, row, TALK, "row", 7]) if number % 7 == 5 else row
        )
    return made


def parquet(draw: random.Random) -> bytes:
    good = [row for row in rows(draw) if isinstance(row, dict)]
    columns = {name: [row[name] for row in good] for name in ("text", "messages", "question", "answer")}
    arrays, names = [], []
    for name, values in columns.items():
        try:
            arrays.append(pa.array(values))
        except (pa.ArrowException, UnicodeEncodeError):
            arrays.append(pa.array([str(value).encode("utf-8", "surrogatepass") for value in values]).view(pa.string()))
        names.append(name if draw.random() < 0.95 else "text")
    file = io.BytesIO()
    pq.write_table(pa.table(arrays, names=names), file, row_group_size=5, compression=draw.choice(["none", "snappy"]))
    return file.getvalue()


def lines(draw: random.Random) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(draw)).encode()


def array(draw: random.Random) -> bytes:
    return json.dumps(rows(draw), indent=draw.choice([None, 1])).encode()


def text(draw: random.Random) -> bytes:
    return "A line, and\n\n  another é.\n".encode() * draw.choice([0, 1, 10, 1000])


def csv(draw: random.Random) -> bytes:
    return ("text,question,answer\n" + 'a,"b\n""c""",#### 1\n' * draw.choice([0, 2, 9])).encode()


def damaged(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice([0, 1, 1, 2])):
        at = draw.randrange(len(data) + 1)
        kind = draw.choice(["truncate", "flip", "insert", "delete", "double", "utf16", "zero", "tail"])
        if kind == "truncate":
            data = data[:at]
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw.choice(PIECES) + data[at:]
        elif kind in ("delete", "double"):
            end = at + draw.randrange(1, 200)
            data = data[:at] + (data[at:end] * 2 if kind == "double" else b"") + data[end:]
        elif kind == "utf16":
            data = data.decode("utf-8", "replace").encode("utf-16")
        elif kind == "zero":
            data = data[:at] + bytes(40) + data[at + 40 :]
        elif kind == "tail":
            data = data[:-12] + draw.randbytes(12)
    return data


def read_documents(path: Path) -> None:
    config = DataConfig(source=str(path))
    assert all(isinstance(text, str) and text for split in sources.SPLITS for text in sources.texts(config, split))


def read_task(path: Path) -> None:
    task = tasks.load("gsm8k", source=path)
    assert all("messages" in task.row(i) for i in range(task.size))


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "x.jsonl": lines,
    "x.jsonl.gz": lines,
    "x.json": array,
    "X.JSON": lines,
    "x.parquet": parquet,
    "x.csv": csv,
    "x.txt": text,
}


@pytest.mark.parametrize("seed", range(10))
def test_damaged_file_is_read_or_refused_in_a_line(base: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    draw, outcomes = random.Random(seed), []
    for number in range(FILES // 10):
        name = list(KINDS)[number % len(KINDS)]
        path = base / "in" / str(number) / name
        path.parent.mkdir(parents=True)
        data = damaged(KINDS[name](draw), draw)
        path.write_bytes(damaged(gzip.compress(data, mtime=0), draw) if name.endswith("gz") else data)
        for read in (read_documents, read_conversations, read_task):
            try:
                read(path)
                outcomes.append("read")
            except UserError as error:
                message = str(error)
                assert "\n" not in message and (name in message or name.endswith("txt")), message
                where = re.search(rf"(line|row) \d+|{name}:\d+|{WHOLE_FILE}|expected a|holds \w+, not text", message)
                assert where, message
                outcomes.append("refused")
    assert outcomes.count("read") > 10 and outcomes.count("refused") > 10
