"""Rows of a data set: from the hub, or from local files with the same columns, shuffled with one seed."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import requests

from nanochat.config import UserError, base_dir
from nanochat.data import first_line

SEED = 42
REACH_SECONDS = 5.0
SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the rows of a task come from.

    Attributes:
        task: its name. hub: the data set's on the hub. subset: its configuration; None: the only one.
        folder: where the hub keeps the files of that. split: as the data set calls it.
        columns: name -> the type that a row's value must have.
    """

    task: str
    hub: str
    subset: str | None
    folder: str
    split: str
    columns: Mapping[str, type]


@dataclasses.dataclass(frozen=True)
class Table:
    """The shuffled rows of a data set.

    Attributes:
        source: what they are. where: the hub's name or the file's, for messages.
        rows: a `datasets.Dataset`. order: index -> row of it.
    """

    source: Source
    where: str
    rows: Any
    order: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self.order[index]]
        for name, kind in self.source.columns.items():
            if not isinstance(row[name], kind):
                raise self.bad(index, f"{name} is {str(row[name])[:40]!r}, expected {kind.__name__}")
        return row

    def bad(self, index: int, what: str) -> UserError:
        """Return the error for row `index` (of the task), naming the row of the data."""
        return UserError(f"{self.where}, row {self.order[index]}, counted from 0: {what}")


def order(size: int) -> list[int]:
    """Return index -> row of a shuffled split, as `datasets.Dataset.shuffle(seed=42)` shuffles."""
    return np.random.default_rng(SEED).permutation(size).tolist()


def read(source: Source, path: str | Path | None) -> Table:
    """Return the rows of `source`, from the hub or from `path`.

    Args:
        path: a folder that has <task>_<split>.parquet or <split>*.parquet (or .jsonl) in it, in a folder named after
            the task, or where the hub's repository has them; or a file, which is taken for the split that is asked for.

    Raises:
        UserError: the hub cannot be reached, or the files are not there, cannot be read, are empty or lack a column.
    """
    if path is None:
        where, rows = f"{source.hub}, split {source.split}", _from_hub(source)
    else:
        files = _files(source, Path(path).expanduser())
        where, rows = f"source={files[0]}", _from_files(files)
    missing = [name for name in source.columns if name not in rows.column_names]
    if missing:
        raise UserError(
            f"{where}: has no column {missing[0]}, which {source.task} needs; it has {', '.join(rows.column_names)}"
        )
    if len(rows) == 0:
        raise UserError(f"{where}: has no rows")
    return Table(source, where, rows, order(len(rows)))


def _files(source: Source, path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"source={path}: expected a folder or a file of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"source={path}: no such file or folder")
    for folder in (path, path / source.task, path / source.folder):
        for stem in (f"{source.task}_{source.split}", source.split):
            if found := sorted(file for file in folder.glob(f"{stem}[.-]*") if file.suffix in SUFFIXES):
                return found
    raise UserError(
        f"source={path}: has no file of {source.task}, {source.split}: expected {source.task}_{source.split}.parquet "
        f"(or .jsonl), or {source.folder}/{source.split}*.parquet as on the hub"
    )


def _from_files(files: list[Path]) -> Any:
    import datasets  # takes seconds to import, and many tasks do without

    builder = "parquet" if files[0].suffix == ".parquet" else "json"
    cache = str(base_dir() / "datasets")
    try:
        with _without_bars():
            return datasets.load_dataset(builder, data_files=[str(f) for f in files], split="train", cache_dir=cache)
    except Exception as error:  # its readers fail in dozens of ways: one line for all
        raise UserError(f"source={files[0]}: cannot be read ({_reason(error)})") from error


def _from_hub(source: Source) -> Any:
    import datasets

    with _offline_if_unreachable() as reached:
        try:
            return datasets.load_dataset(source.hub, source.subset, split=source.split)
        except Exception as error:  # the hub, its caches and its readers fail in dozens of ways: one line for all
            reason = _reason(error) if reached else "the hub does not answer, and no earlier download is kept"
            raise UserError(
                f"the data set {source.hub}, split {source.split}, cannot be had: {reason}; check the network, or name "
                f"a file or folder with its rows: source=/path"
            ) from error


def _reason(error: BaseException) -> str:
    return first_line(error.__cause__ or error)


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """Spare `datasets` its half minute of retries where the hub is out of reach; it looks into its cache then."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    reached = before or _answers(config.HF_ENDPOINT)
    config.HF_HUB_OFFLINE = not reached or before
    try:
        yield reached
    finally:
        config.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    try:
        requests.head(address, timeout=REACH_SECONDS)
    except requests.RequestException:
        return False
    return True


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
