"""Files that people have, read row by row: every kind, form, compression and encoding, and what is wrong with them."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.config import UserError
from nanochat.data import records

ROWS = [{"text": "One, two.\n\n  Three\tfour."}, {"text": "2024-03-01"}, {"text": "日本 é 😀"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'text\n"One, two.\n\n  Three\tfour."\n2024-03-01\n日本 é 😀\n'


def values(path: Path, **options: Any) -> list[Any]:
    return [value for _, value in records.read(path, **options)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, pa.Codec("zstd").compress])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSON", "\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.ndjson", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "[\n" + ",\n".join(LINES.splitlines()) + "\n]"),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.json", LINES.replace("\n", " ")),
        ("a.Csv", CSV),
        ("a.tsv", "text\tid\n" + "".join(f'"{row["text"]}"\t7\n' for row in ROWS)),
        ("a.csv", "id;text\r\n" + "".join(f'7;"{row["text"]}"\r\n' for row in ROWS)),
    ],
)
def test_rows_of_every_form(tmp_path: Path, name: str, content: str, compress: Callable[..., Any], encoding: str):
    path = tmp_path / (name if compress is bytes else f"{name}.GZ")
    data = compress(content.encode(encoding))
    path.write_bytes(data if isinstance(data, bytes) else data.to_pybytes())
    assert [{"text": value["text"]} for value in values(path)] == ROWS


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parquet_strings_of_every_writer(tmp_path: Path, kind: pa.DataType):
    texts = pa.array([*(row["text"] for row in ROWS), None]).dictionary_encode().cast(pa.string())
    texts = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    pq.write_table(pa.table({"text": texts, "turns": [[{"role": "user"}]] * 4}), tmp_path / "a.PARQUET")
    rows = list(records.read(tmp_path / "a.PARQUET"))
    assert rows == [(i, row | {"turns": [{"role": "user"}]}) for i, row in enumerate([*ROWS, {"text": None}], start=1)]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.bz2"])
def test_text_file_is_one_row_with_its_lines(tmp_path: Path, name: str):
    text = "Title\n\n  indented\n\n\nlast line without a line break"
    data = text.replace("\n", "\r\n").encode("utf-8-sig")
    (tmp_path / name).write_bytes(bz2.compress(data) if name.endswith("2") else data)
    assert list(records.read(tmp_path / name)) == [(1, {"text": text})]


@pytest.mark.parametrize("paragraph", ["Lines of\na paragraph.\n\n", "A line.\n", "word ", "\n"])
def test_long_text_file_is_split_at_blank_lines(tmp_path: Path, paragraph: str):
    text = paragraph * 5000
    (tmp_path / "a.txt").write_text(text)
    parts = [value["text"] for value in values(tmp_path / "a.txt")]
    assert "".join(parts) == text
    sizes = [len(part) for part in parts]
    assert max(sizes) <= records.MAX_TEXT_CHARS and min(sizes[:-1], default=10**6) > records.MAX_TEXT_CHARS / 2
    assert all(part.endswith(paragraph) for part in parts) or paragraph == "word "


def test_array_that_is_a_row_itself_is_not_spread(tmp_path: Path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "a.json").write_text(json.dumps(talk, indent=2))
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(talk)}\n{json.dumps(talk)}\n")
    is_talk = lambda value: "role" in value[0]  # noqa: E731
    assert values(tmp_path / "a.json") == talk and values(tmp_path / "a.json", is_row=is_talk) == [talk]
    assert list(records.read(tmp_path / "b.jsonl")) == [(1, talk), (2, talk)]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d b\uDE00", "\ud800": ["\ud83d\ude00"]}')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\xed\xa0\xbd b"}\n')
    parquet = pa.array([b"a\xed\xa0\xbd b"]).view(pa.string())
    pq.write_table(pa.table({"text": parquet}), tmp_path / "c.parquet")
    assert values(tmp_path / "a.jsonl") == [{"text": "a\ufffd b\ufffd", "\ufffd": ["😀"]}]
    assert values(tmp_path / "b.jsonl") == values(tmp_path / "c.parquet") == [{"text": "a\ufffd b"}]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3 is not valid JSON (Unterminated string"),
        ("a.jsonl", b'{"text": "a\n{"text": "b"}', "line 1 is not valid JSON (Invalid control character"),
        ("a.json", b'[\n{"text": "a"},\n{"text" "b"}\n]', "line 3 is not valid JSON (Expecting ':' delimiter)"),
        ("a.json", b'[\n{"text": "a"},\n', "line 2 is not valid JSON (Expecting value)"),
        ("a.json", f'{{"a": {DEEP}'.encode(), "line 1 is not valid JSON (nested too deeply)"),
        ("a.jsonl", f'{{}}\n{{"a": {DEEP}'.encode(), "line 2 is not valid JSON (nested too deeply)"),
        ("a.json", b"[1" + b"0" * 5000 + b"]", "line 1 is not valid JSON (Exceeds the limit"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 (byte 0xe9): save the file as UTF-8"),
        ("a.txt", b"one\ncaf\xe9", "line 2 is not UTF-8 (byte 0xe9)"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "line 1 has a NUL character"),
        ("a.txt.gz", gzip.compress(b"one two three", mtime=0)[:-9], "unreadable txt (Truncated compressed stream)"),
        ("a.csv", b'text,id\na,1\n\n"b,2', "row 2 is not valid CSV (unexpected end of data)"),
        ("a.csv", b"text,id\na,1\nb,c,2\n", "row 2 has 3 fields, the header 2"),
        ("a.csv", b"text,id,text\n", "two columns are named 'text': rename or delete one of them"),
        ("a.parquet", b"PAR1PAR1", "unreadable parquet ("),
        ("gone.txt", None, "unreadable txt (No such file or directory)"),
        ("a.docx", b"x", "expected a file of .parquet, .jsonl"),
        ("a.parquet.gz", b"x", "expected a file of .parquet, .jsonl"),
    ],
)
def test_unreadable_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes | None, problem: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        values(path)
    assert str(caught.value).startswith(f"{path}: {problem}") and "\n" not in str(caught.value)


def test_unreadable_parquet_row_is_named(tmp_path: Path):
    for name, column in {
        "a": pa.array([b"a", b"\xff"]).view(pa.string()),
        "b": pa.array([0, 2**62], pa.time64("us")),
    }.items():
        pq.write_table(pa.table({"x": column}), tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=rf"{name}.parquet: row 2"):
            values(tmp_path / f"{name}.parquet")
    table = pa.table([pa.array(["a"]), pa.array([1])], names=["text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet: two columns are named 'text'"):
        values(tmp_path / "c.parquet")
