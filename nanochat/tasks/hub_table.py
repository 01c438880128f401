"""Tasks whose rows come from a data set of the Hugging Face hub, or from local files with its columns."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import requests

from nanochat.config import UserError, base_dir
from nanochat.data import Conversation
from nanochat.tasks.task import Task
from nanochat.text import reason

SHUFFLE_SEED = 42
HUB_TIMEOUT_SECONDS = 5.0
SUFFIXES = (".parquet", ".jsonl", ".json")


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
            or <split>*.parquet (or .jsonl), in it, in a folder named after the task, or in the folder of the hub.
    """
    if source is None:
        origin, rows = f"{table.repo}, split {split}", _load_from_hub(table, split)
    else:
        files = _find_files(name, table, split, Path(source).expanduser())
        origin, rows = f"source={files[0]}", _load_files(files)
    missing = [column for column in table.columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{origin}: has no column {missing[0]}, which {name} needs; it has {', '.join(rows.column_names)}"
        )
    if len(rows) == 0:
        raise UserError(f"{origin}: has no rows")
    order = shuffled_indices(len(rows))

    def conversation(index: int) -> Conversation:
        row = rows[order[index]]
        try:
            for column, kind in table.columns.items():
                if not isinstance(row[column], kind):
                    raise UserError(f"{column} is {str(row[column])[:40]!r}, expected {kind.__name__}")
            return make_row(row)
        except UserError as error:
            raise UserError(f"{origin}, row {order[index]} (counted from 0): {error}") from None

    return Task(name, kind, len(rows), conversation, is_correct, baseline)


def shuffled_indices(size: int) -> list[int]:
    """Return the order of `datasets.Dataset.shuffle(seed=42)`."""
    return np.random.default_rng(SHUFFLE_SEED).permutation(size).tolist()


def _find_files(name: str, table: HubTable, split: str, path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"source={path}: expected a folder or a file of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"source={path}: no such file or folder")
    for folder in (path, path / name, path / table.folder):
        for stem in (f"{name}_{split}", split):
            if files := sorted(file for file in folder.glob(f"{stem}[.-]*") if file.suffix in SUFFIXES):
                return files
    raise UserError(
        f"source={path}: has no file of {name}, {split}: expected {name}_{split}.parquet (or .jsonl), "
        f"or {table.folder}/{split}*.parquet as on the hub"
    )


def _load_files(files: list[Path]) -> Any:
    import datasets  # takes seconds to import, and many tasks do not need it

    builder = "parquet" if files[0].suffix == ".parquet" else "json"
    cache, progress_bars = str(base_dir() / "datasets"), not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(builder, data_files=[str(f) for f in files], split="train", cache_dir=cache)
    except Exception as error:  # its readers raise dozens of types
        raise UserError(f"source={files[0]}: cannot be read ({reason(error.__cause__ or error)})") from error
    finally:
        if progress_bars:
            datasets.enable_progress_bars()


def _load_from_hub(table: HubTable, split: str) -> Any:
    import datasets
    from datasets import config

    # Where the hub is not reachable, `datasets` uses its cache at once, without half a minute of retries.
    offline = config.HF_HUB_OFFLINE
    reachable = offline or _responds(config.HF_ENDPOINT)
    config.HF_HUB_OFFLINE = offline or not reachable
    try:
        return datasets.load_dataset(table.repo, table.subset, split=split)
    except Exception as error:  # the hub, its cache and its readers raise dozens of types
        problem = "the hub is not reachable, and no earlier download is cached"
        raise UserError(
            f"the data set {table.repo}, split {split}, could not be loaded: "
            f"{reason(error.__cause__ or error) if reachable else problem}; check the network, "
            "or give a file or folder with its rows: source=/path"
        ) from error
    finally:
        config.HF_HUB_OFFLINE = offline


def _responds(url: str) -> bool:
    try:
        requests.head(url, timeout=HUB_TIMEOUT_SECONDS)
    except requests.RequestException:
        return False
    return True
