"""The CORE eval bundle on disk: tasks, their rows in the order of evaluation, and random baselines.

    core.yaml              icl_tasks: label, icl_task_type, dataset_uri, num_fewshot [n], continuation_delimiter
    eval_meta_data.csv     "Eval Task", "Random baseline" in percent
    eval_data/<uri>        the rows, a JSON object a line:
        multiple_choice    query, choices, gold (index of the correct choice)
        schema             context_options, continuation, gold
        language_modeling  context, continuation

`read` raises errors of the bundle itself, `load` those of one task. Source: DCLM (arXiv 2406.11794).
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

import yaml

from nanochat import jsonl
from nanochat.config import UserError, base_dir, nearest
from nanochat.data import download
from nanochat.text import reason

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
MAX_BYTES, MAX_FILES = 2 * 10**9, 1000  # unpacked; the published bundle has 0.2 GB in 86 files and folders
TASKS_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
HASH_FILE = "archive.sha256"  # of the zip file that was unpacked, as sha256sum prints it
NUM_TASKS = 22  # of the published bundle
SHUFFLE_SEED = 1337
# kind of task -> (fields of a row that are strings, the field that is a list of strings, to which gold is an index)
FIELDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "multiple_choice": (("query",), "choices"),
    "schema": (("continuation",), "context_options"),
    "language_modeling": (("context", "continuation"), None),
}


class Row(NamedTuple):
    """A row of a task: its line in the file, counted from 1, and its fields."""

    line: int
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle whose rows are not read yet."""

    folder: Path
    entries: Mapping[str, Mapping[str, Any]]  # label -> the task's entry in core.yaml
    baselines: Mapping[str, tuple[int, str]]  # label -> (line of the CSV, percent as text)


@dataclasses.dataclass(frozen=True)
class CoreTask:
    """A task, ready to be evaluated."""

    label: str
    kind: str  # one of FIELDS
    path: Path  # of the rows
    num_fewshot: int
    delimiter: str  # between query and answer
    baseline: float  # accuracy of random guessing, in [0, 1)
    rows: tuple[Row, ...]  # shuffled, then truncated


def default_dir() -> Path:
    return base_dir() / "eval_bundle"


def fetch(url: str = URL, options: download.Options = download.Options(), sha256: str | None = SHA256) -> Path:
    """Download and unpack the published bundle if it is not there yet; return its folder.

    Its zip file must have this SHA-256, unless that is None. One that is refused is deleted if it was downloaded now.
    """
    folder = default_dir()
    if (folder / TASKS_FILE).exists():
        if sha256 and (digest := read_hash(folder)) not in (None, sha256):
            problem = f"its zip file had the SHA-256 {digest}, expected {sha256}"
            raise UserError(f"{folder}: {problem}; delete it to download it again, or --set bundle_sha256={digest}")
        return folder
    archive, unpacked = folder.with_name(f"{folder.name}.zip"), folder.with_name(f".{folder.name}.{os.getpid()}")
    is_new = not archive.exists()
    if is_new:
        problem = "not a zip file; does a proxy answer in the server's place?"
        download.fetch(url, archive, options, check=lambda path: "" if zipfile.is_zipfile(path) else problem)
    try:
        _unpack(archive, unpacked, sha256)
        os.replace(_bundle_folder(unpacked), folder)
        archive.unlink()
    except Exception as error:  # of the disk, the format, the compression, the encryption: those of zipfile vary
        if is_new:
            archive.unlink(missing_ok=True)
        raise UserError(
            f"{archive} cannot be unpacked into {folder} ({reason(error)}); delete both to download it again, or set "
            "the unpacked folder: --set bundle=…"
        ) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return folder


def _unpack(archive: Path, folder: Path, sha256: str | None) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 not in (None, digest):
            raise ValueError(f"its SHA-256 is {digest}, expected {sha256}: --set bundle_sha256={digest} accepts it")
    with zipfile.ZipFile(archive) as content:
        members = content.infolist()
        size = sum(member.file_size for member in members)  # zipfile unpacks no more than a member declares
        if len(members) > MAX_FILES or size > MAX_BYTES:
            raise ValueError(f"{len(members):,} files of {size:,} bytes are more than {MAX_FILES} of {MAX_BYTES:,}")
        for member in members:
            path, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
            if path.is_absolute() or ".." in path.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f"{member.filename!r} is a link or leads out of the folder")
        content.extractall(folder)
    folder = _bundle_folder(folder)
    if not (folder / TASKS_FILE).exists():
        raise ValueError(f"it has no {TASKS_FILE}")
    (folder / HASH_FILE).write_text(f"{digest}  {archive.name}\n")


def read_hash(folder: Path) -> str | None:
    """Return the SHA-256 of the zip file from which `fetch` unpacked this folder; None if another way was taken."""
    path = folder / HASH_FILE
    return jsonl.read_text(path).partition(" ")[0] if path.exists() else None


def _bundle_folder(folder: Path) -> Path:
    """Return `folder`, or its subfolder eval_bundle if the zip file was made of that."""
    below = folder / "eval_bundle"
    return below if (below / TASKS_FILE).exists() and not (folder / TASKS_FILE).exists() else folder


def read(folder: Path) -> Bundle:
    """Read a bundle's task list and baselines, but no rows."""
    folder = _bundle_folder(Path(folder).expanduser())
    path = folder / TASKS_FILE
    if not path.exists():
        raise UserError(f"bundle={folder}: has no {TASKS_FILE}; set the folder of the unpacked eval_bundle.zip")
    try:
        content = yaml.safe_load(jsonl.read_text(path))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({problem or str(error).splitlines()[0]})") from None
    tasks = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise UserError(f"{path}: has no list of icl_tasks")
    entries: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(tasks, start=1):
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(label, str) or label in entries:
            problem = f"repeats the label {label}" if label else "has no label"
            raise UserError(f"{path}: task {number} of icl_tasks {problem}")
        entries[label] = entry
    path = folder / BASELINES_FILE
    rows = csv.DictReader(io.StringIO(jsonl.read_text(path), newline=""))
    for column in ("Eval Task", "Random baseline"):
        if column not in (rows.fieldnames or []):
            raise UserError(f"{path}:1: has no column {column!r}")
    baselines = {row["Eval Task"]: (rows.line_num, row["Random baseline"] or "") for row in rows}
    return Bundle(folder, entries, baselines)


def load(bundle: Bundle, label: str, max_rows: int | None = None) -> CoreTask:
    """Read a task: shuffle its rows with the seed of all tasks, then keep `max_rows`, also for few-shot examples."""
    entry, prefix = bundle.entries[label], f"{bundle.folder / TASKS_FILE}: task {label}"
    kind = entry.get("icl_task_type")
    if kind not in FIELDS:
        raise UserError(f"{prefix} has icl_task_type {kind!r}{nearest(str(kind), FIELDS)}")
    shots, delimiter, uri = entry.get("num_fewshot"), entry.get("continuation_delimiter", " "), entry.get("dataset_uri")
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if not _is_count(shots):
        raise UserError(f"{prefix} has num_fewshot {shots!r}; expected a list of one number, [10]")
    if not isinstance(delimiter, str) or not isinstance(uri, str):
        raise UserError(f"{prefix}: continuation_delimiter and dataset_uri must be strings")
    path = bundle.folder / DATA_FOLDER / uri
    rows = [Row(number, fields) for number, fields in jsonl.read(path)]
    for row in rows:
        if problem := _row_problem(row.fields, kind):
            raise UserError(f"{path}:{row.line}: {problem}")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    rows = rows[:max_rows]
    if len(rows) <= shots:
        limit = f" (max_per_task={max_rows})" if len(rows) == max_rows else ""
        raise UserError(f"{path}: {len(rows)} rows{limit} are too few for {shots} few-shot examples before each")
    return CoreTask(label, kind, path, shots, delimiter, _baseline(bundle, label), tuple(rows))


def task_hash(task: CoreTask) -> str:
    """Return a SHA-256 of everything that decides a task's prompts and score, except the model."""
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


def _row_problem(fields: Any, kind: str) -> str:
    """Return what is wrong with a row, or an empty string."""
    if not isinstance(fields, dict):
        return "expected an object"
    strings, name = FIELDS[kind]
    for string in strings:
        if not isinstance(fields.get(string), str):
            return f"expected a string {string!r}"
    if name is None:
        return ""
    options, gold = fields.get(name), fields.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(x, str) for x in options):
        return f"expected a list of at least two strings {name!r}"
    if not _is_count(gold) or gold >= len(options):
        return f"gold is {gold!r}; expected the index of the correct option, 0 … {len(options) - 1}"
    return ""


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
