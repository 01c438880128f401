"""Sources that `datasets` loads, from the hub or from the disk, written as a folder of parquet shards on first use."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat import corpus
from nanochat.config import UserError
from nanochat.runtime import base_dir

SHARD_CHARS = 250_000_000
VAL_CHARS = 10_000_000
Rows = Iterable[Any]  # mappings from column to value


def from_hub(source: str, text_column: str) -> Path:
    """Return the folder of shards for `hub:<dataset>[:<config>[:<split>]]`, fetching the dataset the first time.

    Raises:
        UserError: the hub or the dataset cannot be reached, or has no such column.
    """
    name, *rest = source.split(":")[1:]
    if not name or len(rest) > 2:
        raise UserError(f"data.source={source}: expected hub:<dataset>[:<config>[:<split>]]")
    subset, split = [*rest, "", ""][:2]
    load = functools.partial(_load_dataset, name, subset or None, split=split or "train")
    folder = base_dir() / "hub" / _slug(f"{name}:{subset}:{split or 'train'}:{text_column}")
    build_once(folder, source, lambda target: _write_rows(load, target, source, text_column))
    return folder


def from_disk(path: Path, text_column: str) -> Path:
    """Return the folder of shards for a local file or folder that `datasets` loads; a change is read anew.

    Raises:
        UserError: it cannot be read, or has no such column.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.source={path}: the folder is empty")
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([str(path.resolve()), text_column, stats]).encode()).hexdigest()[:16]
    folder = base_dir() / "hub" / f"{_slug(path.stem)}-{digest}"
    load = functools.partial(_load_local, path)
    build_once(folder, str(path), lambda target: _write_rows(load, target, str(path), text_column))
    return folder


def _load_dataset(*args: Any, **options: Any) -> Rows:
    import datasets  # takes seconds to import, and few sources need it

    return datasets.load_dataset(*args, streaming=True, **options)


def _load_local(path: Path) -> Rows:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved
        if "train" not in saved:
            raise UserError(
                f"data.source={path}: no split train; name one of {', '.join(map(str, saved))}: {path}/<split>"
            )
        return saved["train"]
    if path.is_dir():
        return _load_dataset(str(path), split="train")
    kinds = {".csv": "csv", ".json": "json", ".txt": "text"}
    if path.suffix not in kinds:
        raise UserError(f"data.source={path}: expected a folder or a file of .parquet, .jsonl, {', '.join(kinds)}")
    return _load_dataset(kinds[path.suffix], data_files=str(path), split="train")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "__", text).strip("_") or "data"


def _write_rows(load: Callable[[], Rows], folder: Path, source: str, text_column: str) -> None:
    """Write documents as shards. Every hundredth, up to 10 million characters in all, goes to the validation shard."""
    train: list[str] = []
    val: list[str] = []
    shards, train_chars, val_chars = 0, 0, 0
    for number, text in enumerate(_loaded(load, source, text_column)):
        if number % 100 == 1 and val_chars < VAL_CHARS:
            val.append(text)
            val_chars += len(text)
            continue
        train.append(text)
        train_chars += len(text)
        if train_chars >= SHARD_CHARS:
            corpus.write_shard(folder / f"shard_{shards:05d}.parquet", train, column=text_column)
            shards, train_chars = shards + 1, 0
            train.clear()
    if not val:
        raise UserError(f"data.source={source}: needs two documents at least, one to train and one to validate")
    for texts in [train, val]:
        if texts:
            corpus.write_shard(folder / f"shard_{shards:05d}.parquet", texts, column=text_column)
            shards += 1


def _loaded(load: Callable[[], Rows], source: str, text_column: str) -> Iterator[str]:
    try:
        for row in load():
            if text_column not in row:
                names = ", ".join(row)
                raise UserError(
                    f"data.source={source}: no column {text_column!r}, it has {names}: set data.text_column"
                )
            text = row[text_column]
            if not isinstance(text, str | None):
                raise UserError(f"data.source={source}: column {text_column!r} is not text: set data.text_column")
            if text:
                yield text
    except UserError:
        raise
    except Exception as error:  # the hub, its caches and its readers fail in dozens of ways: one line for all
        raise UserError(
            f"data.source={source} cannot be read ({type(error).__name__}: {first_line(error)}); check the name and "
            "the network, or use --set data.source=embedded"
        ) from error


def build_once(folder: Path, what: str, build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary folder that becomes `folder` when complete; one process builds, others wait.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            print(f"writing {what} as parquet shards into {folder} (only this once)", flush=True)
            build(temporary)
            os.replace(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # else a process without our lock was quicker, which is as good
            raise UserError(
                f"{folder} cannot be written ({first_line(error)}): make room, or set NANOCHAT_BASE_DIR elsewhere"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path`; the system drops it when the process dies."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError):  # Windows has no fcntl: there every process builds its own copy
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
