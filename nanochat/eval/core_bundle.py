"""The bundle of the CORE evaluation on disk: its tasks, their rows in the order of evaluation, what guessing scores.

    core.yaml              icl_tasks: label, icl_task_type, dataset_uri, num_fewshot [n], continuation_delimiter
    eval_meta_data.csv     "Eval Task", "Random baseline" in percent
    eval_data/<uri>        the rows, a JSON object a line:
        multiple_choice    query, choices, gold (index of the right one)
        schema             context_options, continuation, gold
        language_modeling  context, continuation

A fault in what describes the bundle is one of the bundle; a fault in a task's entry or rows is one of that task.
Source: DCLM (arXiv 2406.11794), in the selection of nanochat.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import yaml

from nanochat.config import UserError, base_dir, nearest
from nanochat.data import download

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
TASKS_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
NUM_TASKS = 22  # of the published bundle
SHUFFLE_SEED = 1337
OPTIONS = {"multiple_choice": "choices", "schema": "context_options", "language_modeling": None}
TEXTS = {"multiple_choice": ("query",), "schema": ("continuation",), "language_modeling": ("context", "continuation")}


class Row(NamedTuple):
    """A row of a task: its number in the file, counted from 1, and its fields."""

    line: int
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle, as far as it is read before its tasks.

    Attributes:
        folder: where core.yaml lies. entries: label -> the task's entry in core.yaml, in its order.
        baselines: label -> (line of the CSV, percent as text).
    """

    folder: Path
    entries: Mapping[str, Mapping[str, Any]] = dataclasses.field(repr=False)
    baselines: Mapping[str, tuple[int, str]] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class CoreTask:
    """A task, ready to be evaluated.

    Attributes:
        label: its name. kind: multiple_choice, schema or language_modeling. path: of its rows.
        num_fewshot: solved rows in front of each. delimiter: between query and answer.
        baseline: accuracy of guessing, 0 … 1 without 1. rows: shuffled, then cut.
    """

    label: str
    kind: str
    path: Path
    num_fewshot: int
    delimiter: str
    baseline: float
    rows: tuple[Row, ...] = dataclasses.field(repr=False)


def default_dir() -> Path:
    """Return the folder where a bundle is looked for, and fetched to."""
    return base_dir() / "eval_bundle"


def fetch(folder: Path | None = None, *, url: str = URL, options: download.Options = download.Options()) -> Path:
    """Return the folder of the published bundle, which is downloaded and unpacked where it is not there yet.

    Raises:
        UserError: it could not be fetched, or the disk is full; the same command goes on.
    """
    folder = folder or default_dir()
    if (folder / TASKS_FILE).exists():
        return folder
    archive, unpacked = folder.with_name(f"{folder.name}.zip"), folder.with_name(f".{folder.name}.{os.getpid()}")
    if not archive.exists():
        download.fetch(url, archive, options, check=_not_a_zip)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(unpacked)
        os.replace(_inside(unpacked), folder)
        archive.unlink()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{archive} cannot be unpacked into {folder} ({error}); delete both to fetch it again, or give the "
            "unpacked folder: --set bundle=…"
        ) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return folder


def _not_a_zip(path: Path) -> str:
    return "" if zipfile.is_zipfile(path) else "not a zip file; does a proxy answer in the server's place?"


def _inside(folder: Path) -> Path:
    """Return `folder`, or the folder in it that the zip file was made of."""
    below = folder / "eval_bundle"
    return below if (below / TASKS_FILE).exists() and not (folder / TASKS_FILE).exists() else folder


def read(folder: Path) -> Bundle:
    """Read what describes a bundle; rows are read task by task, by `load`.

    Raises:
        UserError: it is no bundle: a file or column is missing, or core.yaml lists no tasks.
    """
    folder = _inside(Path(folder).expanduser())
    path = folder / TASKS_FILE
    if not path.exists():
        raise UserError(f"bundle={folder}: has no {TASKS_FILE}; give the folder of the unpacked eval_bundle.zip")
    try:
        content = yaml.safe_load(_text(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: is no YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML ({str(error).splitlines()[0]})") from None
    tasks = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise UserError(f"{path}: has no list of icl_tasks")
    entries: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(tasks, start=1):
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(label, str) or label in entries:
            raise UserError(
                f"{path}: task {number} of icl_tasks has {'no label' if not label else f'the label {label} again'}"
            )
        entries[label] = entry
    return Bundle(folder, entries, _baselines(folder / BASELINES_FILE))


def _baselines(path: Path) -> dict[str, tuple[int, str]]:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    for column in ("Eval Task", "Random baseline"):
        if column not in (rows.fieldnames or []):
            raise UserError(f"{path}:1: has no column {column!r}")
    return {row["Eval Task"]: (rows.line_num, row["Random baseline"] or "") for row in rows}


def load(bundle: Bundle, label: str, max_rows: int | None = None) -> CoreTask:
    """Read a task: its rows are shuffled by the seed of all tasks, then cut.

    Args:
        label: of the task. max_rows: rows to keep, also for the solved rows in front of others; None: all.

    Raises:
        UserError: the entry is wrong, the file is not there, or a row is not of the task's kind (with file and line).
    """
    entry, where = bundle.entries[label], f"{bundle.folder / TASKS_FILE}: task {label}"
    kind = entry.get("icl_task_type")
    if kind not in OPTIONS:
        raise UserError(f"{where} has icl_task_type {kind!r}{nearest(str(kind), OPTIONS)}")
    shots, delimiter, uri = entry.get("num_fewshot"), entry.get("continuation_delimiter", " "), entry.get("dataset_uri")
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if not _is_count(shots):
        raise UserError(f"{where} has num_fewshot {shots!r}; expected a list of one number, [10]")
    if not isinstance(delimiter, str) or not isinstance(uri, str):
        raise UserError(f"{where}: continuation_delimiter and dataset_uri have to be texts")
    path = bundle.folder / DATA_FOLDER / uri
    rows = _rows(path, kind)
    random.Random(SHUFFLE_SEED).shuffle(rows)
    rows = rows[:max_rows]
    if len(rows) <= shots:
        cut = f" (max_per_task={max_rows})" if len(rows) == max_rows else ""
        raise UserError(f"{path}: {len(rows)} rows{cut}, but {shots} solved ones have to stand before each")
    return CoreTask(label, kind, path, shots, delimiter, _baseline(bundle, label), tuple(rows))


def digest(task: CoreTask) -> str:
    """Return a SHA-256 of all that decides a task's prompts and its score, whatever model answers."""
    rows = [row.fields for row in task.rows]
    value = [task.label, task.kind, task.num_fewshot, task.delimiter, task.baseline, rows]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _baseline(bundle: Bundle, label: str) -> float:
    path = bundle.folder / BASELINES_FILE
    if label not in bundle.baselines:
        raise UserError(f"{path}: has no line for {label}")
    line, text = bundle.baselines[label]
    try:
        percent = float(text)
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 100:
        raise UserError(f"{path}:{line}: the random baseline of {label} is {text!r}; expected a percentage below 100")
    return 0.01 * percent


def _rows(path: Path, kind: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is no JSON ({error})") from None
        if problem := _problem(fields, kind):
            raise UserError(f"{path}:{number}: {problem}")
        rows.append(Row(number, fields))
    return rows


def _problem(fields: Any, kind: str) -> str:
    """Return what makes a row unfit for its kind of task, or nothing."""
    if not isinstance(fields, dict):
        return "expected an object"
    for name in TEXTS[kind]:
        if not isinstance(fields.get(name), str):
            return f"{name} is {'no text' if name in fields else 'missing'}; a {kind} row has it"
    name = OPTIONS[kind]
    if name is None:
        return ""
    options, gold = fields.get(name), fields.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(x, str) for x in options):
        return f"{name} is {'no list of two texts or more' if name in fields else 'missing'}; a {kind} row has it"
    if not _is_count(gold) or gold >= len(options):
        return f"gold is {gold!r}; expected the index of the right one, 0 … {len(options) - 1}"
    return ""


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
