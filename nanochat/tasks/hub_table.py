"""Tasks whose rows come from a data set of the Hugging Face hub, or from local files with its columns."""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import requests

from nanochat.config import UserError
from nanochat.data import Conversation, records
from nanochat.tasks.task import MissingDataError, Task
from nanochat.text import reason

SHUFFLE_SEED = 42
HUB_TIMEOUT_SECONDS = 5.0


class HubTable(NamedTuple):
    repo: str  # the data set's name on the hub
    subset: str | None  # its configuration, if it has several
    folder: str  # of its files on the hub
    columns: Mapping[str, type]  # that are needed: name -> type of the values


def hub_task(
    name: str,
    kind: Literal["multiple_choice", "generative", "chat"],
    table: HubTable,
    make_row: Callable[[dict[str, Any]], Conversation],
    split: str,
    source: str | Path | None,
    *,
    is_correct: Callable[[Conversation, str], bool] | None = None,
    baseline: float = 0.0,
) -> Task:
    """Return a split of a data set as a task, its rows shuffled with a fixed seed.

    Args:
        make_row: makes a conversation of a row whose columns have the right types; raises UserError if it is malformed.
        source: None: the hub; a file, which is taken for the requested split; or a folder with <name>_<split>.parquet
            or <split>*.parquet (or .jsonl, .json, .csv) in it, in a folder named as the task, or in that of the hub.
    """
    if source is None:
        origin, rows = f"{table.repo}, split {split}", _load_from_hub(table, split)
        place = f"{origin}, row {{}} (counted from 0)".format
    else:
        files = _find_files(name, table, split, Path(source).expanduser())
        origin, places, rows = f"source={files[0]}", *_load_files(files)
        place = places.__getitem__
    if len(rows) == 0:
        raise UserError(f"{origin}: has no rows")
    columns = list(rows[0])
    missing = [column for column in table.columns if column not in columns]
    if missing:
        raise UserError(f"{origin}: has no column {missing[0]}, which {name} needs; it has {', '.join(columns)}")
    order = shuffled_indices(len(rows))

    def conversation(index: int) -> Conversation:
        row = rows[order[index]]
        try:
            for column, kind in table.columns.items():
                if not isinstance(value := row.get(column), kind):
                    raise UserError(f"{column} is {str(value)[:40]!r}, expected {kind.__name__}")
            return make_row(row)
        except UserError as error:
            raise UserError(f"{place(order[index])}: {error}") from None

    return Task(name, kind, len(rows), conversation, is_correct, baseline)


def shuffled_indices(size: int) -> list[int]:
    """Return the order of `datasets.Dataset.shuffle(seed=42)`."""
    return np.random.default_rng(SHUFFLE_SEED).permutation(size).tolist()


def _find_files(name: str, table: HubTable, split: str, path: Path) -> list[Path]:
    if path.is_file():
        if records.kind_of(path) not in records.TABLES:
            raise UserError(f"source={path}: expected a folder or a file of {', '.join(records.TABLES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"source={path}: no such file or folder")
    for folder in (path, path / name, path / table.folder):
        for stem in (f"{name}_{split}", split):
            if files := sorted(file for file in folder.glob(f"{stem}[.-]*") if records.kind_of(file) in records.TABLES):
                return files
    raise MissingDataError(
        f"source={path}: has no file of {name}, {split}: expected {name}_{split}.parquet (or .jsonl), "
        f"or {table.folder}/{split}*.parquet as on the hub"
    )


def _load_files(files: list[Path]) -> tuple[list[str], list[dict[str, Any]]]:
    places, rows = [], []
    for file in files:
        for number, row in records.read(file):
            if not isinstance(row, dict):
                raise UserError(f"source={file}: row {number} is not a JSON object")
            places.append(f"source={file}, row {number}")
            rows.append(row)
    return places, rows


def _load_from_hub(table: HubTable, split: str) -> Any:
    import datasets
    from datasets import config

    # Where the hub is not reachable, `datasets` uses its cache at once, without half a minute of retries.
    offline = config.HF_HUB_OFFLINE
    reachable = offline or _responds(config.HF_ENDPOINT, time.monotonic() // 60)
    config.HF_HUB_OFFLINE = offline or not reachable
    try:
        return datasets.load_dataset(table.repo, table.subset, split=split)
    except Exception as error:  # the hub, its cache and its readers raise dozens of types
        problem = "the hub is not reachable, and no earlier download is cached"
        raise (UserError if "Unknown split" in str(error) else MissingDataError)(
            f"the data set {table.repo}, split {split}, could not be loaded: "
            f"{reason(error.__cause__ or error) if reachable else problem}; check the network, "
            "or give a file or folder with its rows: source=/path"
        ) from error
    finally:
        config.HF_HUB_OFFLINE = offline


@functools.lru_cache  # the tasks of a run, loaded one after another, wait for the hub only once
def _responds(url: str, _minute: float) -> bool:
    try:
        requests.head(url, timeout=HUB_TIMEOUT_SECONDS)
    except requests.RequestException:
        return False
    return True
