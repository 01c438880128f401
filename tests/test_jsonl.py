"""JSON Lines: line numbers in errors, and lines that are whole after a crash."""

from pathlib import Path

import pytest

from nanochat import jsonl
from nanochat.config import UserError


def test_appended_rows_are_read_back_with_their_line_numbers(tmp_path: Path):
    path = tmp_path / "new" / "rows.jsonl"
    jsonl.append(path, {"a": 1}, ["é", None])
    jsonl.append(path, "half a pair: \ud800")
    assert jsonl.read(path) == [(1, {"a": 1}), (2, ["é", None]), (3, "half a pair: \ud800")]


def test_blank_lines_are_skipped_but_counted(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('1\n\n \n2\r\n"last line without a line break"')
    assert jsonl.read(path) == [(1, 1), (4, 2), (5, "last line without a line break")]


@pytest.mark.parametrize("line", [b"{", b'{"a": 1', b"caf\xe9", b'"\xff"', b"[" * 100_000])
def test_invalid_line_is_named(tmp_path: Path, line: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"1\n" + line + b"\n3\n")
    with pytest.raises(jsonl.InvalidLineError, match=r"rows\.jsonl:2: not valid JSON") as caught:
        jsonl.read(path)
    assert caught.value.number == 2


def test_missing_file_is_an_error_unless_allowed(tmp_path: Path):
    assert jsonl.read(tmp_path / "none.jsonl", missing_ok=True) == []
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read: No such file"):
        jsonl.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n'])
@pytest.mark.parametrize("partial", ['{"step": 2, "lo', "x" * 200_000])
def test_partial_last_line_is_dropped_on_read_and_removed_on_append(tmp_path: Path, whole: str, partial: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(whole + partial)
    assert jsonl.read(path, drop_partial=True) == ([(1, {"step": 1})] if whole else [])
    with pytest.raises(jsonl.InvalidLineError):
        jsonl.read(path)
    jsonl.append(path, {"step": 2})
    assert path.read_text() == whole + '{"step": 2}\n'


def test_nan_and_unwritable_files_are_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="float"):
        jsonl.append(path, {"loss": float("nan")})
    assert not path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        jsonl.append(tmp_path / "file" / "rows.jsonl", 1)
