"""Rows of a data set, shuffled with a fixed seed: from the Hugging Face hub, or from local files with its columns."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import requests

from nanochat.config import UserError, base_dir
from nanochat.text import reason

SHUFFLE_SEED = 42
HUB_TIMEOUT_SECONDS = 5.0
SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
        repo: its name on the hub. subset: its configuration, if it has several. folder: of its files on the hub.
        columns: the columns that are needed, name -> type of the values.
    """

    task: str
    repo: str
    subset: str | None
    folder: str
    split: str
    columns: Mapping[str, type]


@dataclasses.dataclass(frozen=True)
class Table:
    """Shuffled rows: row `index` of the table is row `order[index]` of `rows`, a `datasets.Dataset`.

    Attributes:
        origin: the hub's name or the file's, for error messages.
    """

    source: Source
    origin: str
    rows: Any
    order: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self.order[index]]
        for name, kind in self.source.columns.items():
            if not isinstance(row[name], kind):
                raise self.error(index, f"{name} is {str(row[name])[:40]!r}, expected {kind.__name__}")
        return row

    def error(self, index: int, message: str) -> UserError:
        """Return an error about a row that names its position in the data set."""
        return UserError(f"{self.origin}, row {self.order[index]} (counted from 0): {message}")


def shuffled_indices(size: int) -> list[int]:
    """Return the order of `datasets.Dataset.shuffle(seed=42)`."""
    return np.random.default_rng(SHUFFLE_SEED).permutation(size).tolist()


def load(source: Source, path: str | Path | None) -> Table:
    """Return the rows of `source`, from the hub or from `path`.

    Args:
        path: a file, which is taken for the requested split; or a folder with <task>_<split>.parquet or
            <split>*.parquet (or .jsonl), in it, in a folder named after the task, or in the folder of the hub.

    Raises:
        UserError: the data could not be loaded, is empty, or lacks a column.
    """
    if path is None:
        origin, rows = f"{source.repo}, split {source.split}", _load_from_hub(source)
    else:
        files = _find_files(source, Path(path).expanduser())
        origin, rows = f"source={files[0]}", _load_files(files)
    missing = [name for name in source.columns if name not in rows.column_names]
    if missing:
        columns = ", ".join(rows.column_names)
        raise UserError(f"{origin}: has no column {missing[0]}, which {source.task} needs; it has {columns}")
    if len(rows) == 0:
        raise UserError(f"{origin}: has no rows")
    return Table(source, origin, rows, shuffled_indices(len(rows)))


def _find_files(source: Source, path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"source={path}: expected a folder or a file of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"source={path}: no such file or folder")
    for folder in (path, path / source.task, path / source.folder):
        for stem in (f"{source.task}_{source.split}", source.split):
            if files := sorted(file for file in folder.glob(f"{stem}[.-]*") if file.suffix in SUFFIXES):
                return files
    raise UserError(
        f"source={path}: has no file of {source.task}, {source.split}: expected {source.task}_{source.split}.parquet "
        f"(or .jsonl), or {source.folder}/{source.split}*.parquet as on the hub"
    )


def _load_files(files: list[Path]) -> Any:
    import datasets  # takes seconds to import, and many tasks do not need it

    builder = "parquet" if files[0].suffix == ".parquet" else "json"
    cache = str(base_dir() / "datasets")
    try:
        with _without_progress_bars():
            return datasets.load_dataset(builder, data_files=[str(f) for f in files], split="train", cache_dir=cache)
    except Exception as error:  # its readers raise dozens of types
        raise UserError(f"source={files[0]}: cannot be read ({_reason(error)})") from error


def _load_from_hub(source: Source) -> Any:
    import datasets

    with _offline_if_unreachable() as reachable:
        try:
            return datasets.load_dataset(source.repo, source.subset, split=source.split)
        except Exception as error:  # the hub, its cache and its readers raise dozens of types
            reason = _reason(error) if reachable else "the hub is not reachable, and no earlier download is cached"
            raise UserError(
                f"the data set {source.repo}, split {source.split}, could not be loaded: {reason}; check the network, "
                "or give a file or folder with its rows: source=/path"
            ) from error


def _reason(error: BaseException) -> str:
    return reason(error.__cause__ or error)


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """Let `datasets` use its cache at once if the hub is not reachable, without half a minute of retries."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    reachable = before or _responds(config.HF_ENDPOINT)
    config.HF_HUB_OFFLINE = before or not reachable
    try:
        yield reachable
    finally:
        config.HF_HUB_OFFLINE = before


def _responds(url: str) -> bool:
    try:
        requests.head(url, timeout=HUB_TIMEOUT_SECONDS)
    except requests.RequestException:
        return False
    return True


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    import datasets

    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
