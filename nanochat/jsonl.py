"""JSON Lines files: a reader whose errors name the line, and a crash-safe appender; atomic writes of text files."""

import json
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

from nanochat.config import UserError
from nanochat.text import reason


class InvalidLineError(UserError):
    """A line that is not valid JSON; `number` counts from 1, `reason` says what is wrong."""

    def __init__(self, path: Path, number: int, reason: str):
        super().__init__(f"{path}:{number}: {reason}")
        self.number, self.reason = number, reason


def read(path: Path, *, missing_ok: bool = False, drop_partial: bool = False) -> list[tuple[int, Any]]:
    """Return (line number, value) of every line that is not blank.

    Args:
        missing_ok: a file that does not exist is empty.
        drop_partial: ignore a last line without a line break: what a process killed in `append` leaves behind.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        if missing_ok and isinstance(error, FileNotFoundError):
            return []
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if drop_partial:
        data = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise InvalidLineError(path, number, f"not valid JSON ({error})") from None
    return rows


def read_text(path: Path, name: str | None = None) -> str:
    """Return a UTF-8 file's text; an error calls it `name`, by default its path."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name or path} cannot be read: {reason(error)}") from None


def append(path: Path, *rows: Any, sync: bool = True) -> None:
    """Add each row as a line; creates the file and its folder, and removes a partial last line first.

    NaN and infinity, which JSON does not have, are a ValueError. `sync` waits for the disk, a few milliseconds.
    """
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    lines = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes its JSON escape
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _drop_partial_line_(file)
            file.write(lines)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from None


def write_atomic(path: Path, text: str) -> None:
    """Create or replace a text file, and its folder: a reader or a crash sees the old text or the new."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from None


def _drop_partial_line_(file: BinaryIO) -> None:
    """Truncate a file, opened at its end, behind its last line break."""
    if file.tell():
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = data.rfind(b"\n") + 1
        file.truncate(end)
