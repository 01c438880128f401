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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.config import UserError
from nanochat.text import reason

TABLES = {
    ".parquet": ".parquet",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".json",
    ".csv": ".csv",
    ".tsv": ".csv",
}
KINDS = TABLES | {".txt": ".txt"}
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes: names may be wrong
EXPECTED = f"a file of {', '.join(KINDS)} (all but parquet may be .gz, .bz2 or .zst)"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
STRINGS = {pa.string(), pa.large_string(), pa.string_view(), pa.null()}
MAX_TEXT_CHARS = 10_000  # of a row of a text file: packing crops what is longer than a training row
DECODER = json.JSONDecoder()
SPACES = re.compile(r"\s*")
Row = tuple[int, Any]


class UnreadableFileError(UserError):
    def __init__(self, path: Path | str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.problem = problem


def kind_of(path: Path) -> str | None:
    """Return .parquet, .jsonl, .json, .csv or .txt by the file's name; None: it is not read."""
    stem, suffix = path.stem.lower(), path.suffix.lower()
    if suffix in (".gz", ".bz2", ".zst") and not stem.endswith(".parquet"):
        suffix = Path(stem).suffix
    return KINDS.get(suffix)


def read(path: Path, is_row: Callable[[Any], bool] = lambda value: isinstance(value, dict)) -> Iterator[Row]:
    """Yield (number, value) of every row; numbers count from 1: lines of JSON Lines, else rows.

    Raises UnreadableFileError: one line that names the file and, unless all of it is damaged, the row or line.

    Args:
        is_row: of a JSON file that holds nothing but an array: whether it is a row, and not a list of rows.
    """
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".txt": _read_text}
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path}: expected {EXPECTED}")
    with errors_of(path):
        yield from readers[kind](path) if kind in readers else _read_json(path, is_row)


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Raise what the operating system and pyarrow raise as an UnreadableFileError."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UnreadableFileError(path, f"unreadable {str(kind_of(path))[1:]} ({reason(error)})") from None


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
        if file.peek(2)[:2] in UTF16_MARKS:
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
        with contextlib.suppress(UnicodeDecodeError):
            return _join_surrogates(data.decode("utf-8", "surrogatepass"))
        problem = f"{where} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        raise UnreadableFileError(path, problem) from None


def _join_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_text(path: Path) -> Iterator[Row]:
    """Yield the text, in parts of up to MAX_TEXT_CHARS that end at a blank line, or else at a line break."""
    text = "".join(line for _, line in _lines(path)).replace("\r\n", "\n").replace("\r", "\n")
    start = 0
    for number in itertools.count(1):
        end = start + MAX_TEXT_CHARS
        if end < len(text):
            breaks = [text.rfind(line_break, start, end) + len(line_break) for line_break in ("\n\n", "\n")]
            end = next((position for position in breaks if position > start + 1), end)
        yield number, {"text": text[start:end]}
        start = end
        if start >= len(text):
            return


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses documents of more than 128 KiB
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    rows = csv.reader(itertools.chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    number = 0
    try:
        names = next(rows, [])
        check_names(path, names)
        for number, fields in enumerate(filter(None, rows), start=1):
            if len(fields) != len(names):
                raise UnreadableFileError(path, f"row {number} has {len(fields)} fields, the header {len(names)}")
            yield number, dict(zip(names, fields))
    except csv.Error as error:
        raise UnreadableFileError(path, f"row {number + 1} is not valid CSV ({error})") from None


# ---------------------------------------------------------------------------------------------------------------
# Parquet


def _read_parquet(path: Path) -> Iterator[Row]:
    start = 1
    with pq.ParquetFile(path.absolute()) as file:  # a relative path with a colon would be a URI
        check_names(path, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1000):
            columns = [column_values(column, path, start) for column in batch.columns]
            for number, values in enumerate(zip(*columns), start=start):
                yield number, dict(zip(batch.schema.names, values))
            start += batch.num_rows


def check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UnreadableFileError(path, f"two columns are named {name!r}: rename or delete one of them")


def is_string(kind: pa.DataType) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in STRINGS


def column_values(column: Any, path: Path, first_number: int) -> list[Any]:
    """Return the values of a parquet column; `path` and the number of its first row are for the errors."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time that Python does not have
        if len(column) > 1:
            return [column_values(column.slice(i, 1), path, first_number + i)[0] for i in range(len(column))]
        if is_string(column.type):
            return [decode(column.cast(pa.large_binary())[0].as_py(), path, f"row {first_number}")]
        raise UnreadableFileError(path, f"row {first_number}: unreadable value ({reason(error)})") from None


# ---------------------------------------------------------------------------------------------------------------
# JSON


def parse_json(text: str, path: Path, line: int = 1) -> list[Any]:
    """Return the JSON values that follow one another in `text`, which starts in line `line` of the file."""
    values, start, end, text = [], 0, 0, text.rstrip()
    try:
        while end < len(text):
            start = SPACES.match(text, end).end()  # type: ignore[union-attr]
            value, end = DECODER.raw_decode(text, start)
            values.append(value)
        if "\\ud" in text or "\\uD" in text:  # only escapes can make half a surrogate pair
            values = json.loads(_join_surrogates(json.dumps(values, ensure_ascii=False)))
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        line += text.count("\n", 0, getattr(error, "pos", start))
        raise UnreadableFileError(path, f"line {line} is not valid JSON ({problem})") from None
    return values


def _read_json(path: Path, is_row: Callable[[Any], bool]) -> Iterator[Row]:
    lines = ((number, line) for number, line in _lines(path) if not line.isspace())
    first = list(itertools.islice(lines, 2))
    if len(first) > 1 and not _is_beginning(first[0][1]):
        for number, line in itertools.chain(first, lines):
            yield from ((number, value) for value in parse_json(line, path, number))
        return
    values = parse_json("".join(line for _, line in _lines(path)), path)
    if len(values) == 1 and isinstance(values[0], list) and not is_row(values[0]):
        [values] = values
    yield from enumerate(values, start=1)


def has_plain_lines(path: Path) -> bool:
    """Return whether a JSON file is UTF-8, not compressed and has one value a line: lines can be read on their own."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
        line = first.decode("utf-8-sig", "replace").lstrip()
        return (
            not first.startswith((*COMPRESSIONS, *UTF16_MARKS)) and not line.startswith("[") and not _is_beginning(line)
        )
    return True  # reading it names the problem


def _is_beginning(line: str) -> bool:
    """Return whether a line is the beginning of a JSON value that goes on in the next."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) > 0
    except (ValueError, RecursionError):
        pass  # parse_json names it
    return False
