"""Rows of the files that people have: parquet, JSON in its usual forms, CSV and text, compressed or not.

    .parquet                    a row is a mapping from column to value
    .jsonl .ndjson .json        one value a line, one array of rows, or values one after another, pretty-printed or not
    .csv .tsv                   a row is a mapping from the header's names to strings
    .txt                        the file is one row, {"text": …}; a long one is split at blank lines

Extensions may be in capitals, and all but parquet compressed (gzip, bzip2, zstd). Text is UTF-8, or UTF-16 with its
byte order mark; half a surrogate pair becomes U+FFFD. Strings stay strings, whatever they look like.
"""

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.config import UserError
from nanochat.text import reason

KINDS = {".parquet": ".parquet", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".json": ".json"}
KINDS |= {".csv": ".csv", ".tsv": ".csv", ".txt": ".txt"}
TABLES = (".parquet", ".jsonl", ".json", ".csv")  # kinds whose rows have columns
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes: names may be wrong
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".zst")
EXPECTED = "a file of .parquet, .jsonl, .ndjson, .json, .csv, .tsv or .txt (all but parquet may be .gz, .bz2 or .zst)"
MAX_TEXT_CHARS = 10_000  # of a row of a text file: packing crops what is longer than a training row
SPACES = re.compile(r"\s*")
Row = tuple[int, Any]


class UnreadableFileError(UserError):
    def __init__(self, path: Path | str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.problem = problem


def kind_of(path: Path) -> str | None:
    """Return .parquet, .jsonl, .json, .csv or .txt by the file's name; None: it is not read."""
    name = path.name.lower()
    plain = name.removesuffix(next((suffix for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), ""))
    kind = KINDS.get(Path(plain).suffix)
    return None if plain != name and kind == ".parquet" else kind


def read(path: Path, is_row: Callable[[Any], bool] = lambda value: isinstance(value, dict)) -> Iterator[Row]:
    """Yield (number, value) of every row; numbers count from 1: lines of JSON Lines, else rows.

    Raises UnreadableFileError: one line that names the file and, unless all of it is damaged, the row or line.

    Args:
        is_row: of a JSON file that holds nothing but an array: whether it is a row, and not a list of rows.
    """
    readers = {".parquet": ParquetRows, ".csv": _read_csv, ".txt": _read_text}
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path}: expected {EXPECTED}")
    with errors_of(path):
        yield from readers[kind](path) if kind in readers else _read_json(path, is_row)


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Raise what the operating system and the libraries raise as an UnreadableFileError."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        kind = kind_of(path) or path.suffix
        raise UnreadableFileError(path, f"unreadable {kind[1:]} ({reason(error)})") from None


def text_of(row: Row, column: str, path: Path | str) -> str:
    """Return the text in a row's column, "" for null."""
    number, value = row
    if not isinstance(value, dict):
        raise UnreadableFileError(path, f"row {number} is not a JSON object")
    if column not in value:
        raise no_column(f"{path} row {number}", column, value)
    if not isinstance(text := value[column], str | None):
        raise UnreadableFileError(path, f"row {number}: {column!r} holds {type(text).__name__}, not text")
    return text or ""


def no_column(where: Path | str, column: str, names: Iterable[str]) -> UserError:
    return UserError(f"{where}: no text column {column!r}, it has {', '.join(names)}: set data.text_column")


# ---------------------------------------------------------------------------------------------------------------
# Text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a text file; lines keep their line breaks."""
    with path.open("rb") as file:
        head = file.read(4)
    compression = next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)
    with io.BufferedReader(pa.input_stream(str(path), compression=compression)) as file:
        lines: Iterable[bytes | str] = file
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            lines = io.TextIOWrapper(file, "utf-16", errors="replace", newline="\n")
        for number, line in enumerate(lines, start=1):
            text = decode(line, path, f"line {number}") if isinstance(line, bytes) else line
            if "\0" in text:
                raise UnreadableFileError(path, f"line {number} has a NUL character: save the file as UTF-8 text")
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def decode(data: bytes, path: Path, where: str) -> str:
    """Return UTF-8 as text; surrogates, which some programs write, as their character or U+FFFD."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"{where} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        try:
            return _join_surrogates(data.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise UnreadableFileError(path, problem) from None


def _join_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_text(path: Path) -> Iterator[Row]:
    """Yield the text, in parts of up to MAX_TEXT_CHARS that end at a blank line, or else at a line break."""
    numbers = itertools.count(1)
    lines: list[str] = []
    size, blank = 0, 0  # characters; lines up to the last blank one
    for _, line in _lines(path):
        line = line.replace("\r\n", "\n").replace("\r", "\n")
        for start in range(0, len(line), MAX_TEXT_CHARS):
            piece = line[start : start + MAX_TEXT_CHARS]
            while size + len(piece) > MAX_TEXT_CHARS:
                end = blank or len(lines)
                yield next(numbers), {"text": "".join(lines[:end])}
                lines = lines[end:]
                size, blank = sum(map(len, lines)), 0
            lines.append(piece)
            size += len(piece)
            blank = len(lines) if piece.isspace() else blank
    yield next(numbers), {"text": "".join(lines)}


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses documents of more than 128 KiB
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    delimiter = max(",;\t", key=header.count)
    rows = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    number = 0
    try:
        names = next(rows, [])
        check_names(path, names)
        for number, fields in enumerate(filter(None, rows), start=1):
            if len(fields) != len(names):
                problem = f"row {number} has {len(fields)} fields, the header {len(names)}"
                raise UnreadableFileError(path, problem)
            yield number, dict(zip(names, fields))
    except csv.Error as error:
        raise UnreadableFileError(path, f"row {number + 1} is not valid CSV ({error})") from None


# ---------------------------------------------------------------------------------------------------------------
# Parquet


def is_string(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds strings (or only nulls)."""
    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(check(kind) for check in checks)


def check_names(path: Path, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UnreadableFileError(path, f"{count} columns are named {name!r}: rename or delete the others")


def column_values(column: Any, path: Path, first_number: int) -> list[Any]:
    """Return the values of a parquet column; `path` and the number of its first row are for the errors."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a time that Python does not have
        data = column.cast(pa.large_binary()) if is_string(column.type) else column
    values = []
    for number, value in enumerate(data, start=first_number):
        try:
            value = value.as_py()
        except (ValueError, OverflowError) as error:
            raise UnreadableFileError(path, f"row {number}: unreadable value ({reason(error)})") from None
        values.append(decode(value, path, f"row {number}") if isinstance(value, bytes) else value)
    return values


class ParquetRows(Sequence[Row]):
    """The rows of a parquet file, each made when it is asked for: as Python objects, all of them take much memory."""

    def __init__(self, path: Path):
        self._path = path
        with errors_of(path), pq.ParquetFile(path) as file:
            check_names(path, file.schema_arrow.names)
            self._table = file.read()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        columns = zip(self._table.column_names, self._table.columns)
        return index + 1, {name: column_values(c.slice(index, 1), self._path, index + 1)[0] for name, c in columns}


# ---------------------------------------------------------------------------------------------------------------
# JSON


def parse_line(line: str, path: Path, number: int) -> Any:
    """Return the JSON value of a line; half a surrogate pair in its strings becomes U+FFFD."""
    try:
        return _clean(json.loads(line), line)
    except (ValueError, RecursionError) as error:
        raise _json_error(error, path, number) from None


def _json_error(error: Exception, path: Path, number: int) -> UnreadableFileError:
    problem = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
    return UnreadableFileError(path, f"line {number} is not valid JSON ({problem})")


def _clean(value: Any, source: str) -> Any:
    """Return a value of the JSON text `source` without half surrogate pairs, which only its escapes can make."""
    if "\\ud" not in source and "\\uD" not in source:
        return value
    return json.loads(_join_surrogates(json.dumps(value, ensure_ascii=False)))


def _read_json(path: Path, is_row: Callable[[Any], bool]) -> Iterator[Row]:
    lines = ((number, line) for number, line in _lines(path) if not line.isspace())
    first = list(itertools.islice(lines, 2))
    if len(first) > 1 and not _is_cut(first[0][1]):
        for number, line in itertools.chain(first, lines):
            yield number, parse_line(line, path, number)
        return
    values = _parse_values(path)
    if len(values) == 1 and isinstance(values[0], list) and not is_row(values[0]):
        [values] = values
    yield from enumerate(values, start=1)


def has_plain_lines(path: Path) -> bool:
    """Return whether a JSON file is UTF-8, not compressed and has one value a line: lines can be read on their own."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(4)
        if head.startswith((*COMPRESSIONS, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return False
        file.seek(0)
        line = next((line for line in file if line.strip()), b"").decode("utf-8-sig", "replace")
        return not line or not (line.lstrip().startswith("[") or _is_cut(line))
    return True  # reading it names the problem


def _is_cut(line: str) -> bool:
    """Return whether a line is the beginning of a JSON value that goes on in the next."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        pass  # parse_line names it
    return False


def _parse_values(path: Path) -> list[Any]:
    """Return the JSON values that follow one another in a file."""
    text = "".join(line for _, line in _lines(path)).rstrip()
    values, end = [], 0
    while end < len(text):
        try:
            start = SPACES.match(text, end).end()  # type: ignore[union-attr]
            value, end = json.JSONDecoder().raw_decode(text, start)
            values.append(_clean(value, text[start:end]))
        except (ValueError, RecursionError) as error:
            raise _json_error(error, path, text.count("\n", 0, getattr(error, "pos", start)) + 1) from None
    return values
