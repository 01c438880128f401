"""Sources of documents: folders of parquet or JSON Lines shards, sorted by name.

Those named val, valid, validation, dev or eval validate, else those named test, else the last one. If some are named
train, the rest is not read.

The embedded corpus, data sets of the hub and files of other kinds are written as such a folder on first use. A shard is
read in blocks: a parquet row group, or 1000 lines.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from nanochat.config import PositiveInt, Settings, UserError, base_dir, nearest
from nanochat.data import embedded, mixture, records
from nanochat.text import reason

JSONL_BLOCK_LINES = 1000
CLIMBMIX_VAL = "shard_06542.parquet"
SUFFIXES = (".parquet", ".jsonl", ".ndjson")  # of files that are read where they are
SHARD_CHARS = 250_000_000  # of shards that are written here, about
VAL_CHARS = 10_000_000
DATA_COMMAND = "torchrun launch.py --experiment=data"
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
Rows = Iterator[Any]  # mappings from column to value


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Where documents come from and how they are read.

    Attributes:
        source: embedded, climbmix, hub:<dataset>[:<config>[:<split>]], or a file or folder: parquet, JSON, CSV, text
            (a file is a document, split at blank lines every 10,000 characters), or saved by `datasets`. A mixture:
            0.8*climbmix,0.2*/my/texts, by shares of the tokens; its validation data are mixed likewise.
        text_column: the column (or JSON field) that holds a document's text; "text" for text files.
        skip_bad_shards: skip a corrupt shard with a warning instead of stopping.
        token_cache: keep the tokens of documents on disk, so that a second pass does not tokenize again.
        buffer_docs: documents that packing chooses from.
        shuffle: visit shards, blocks and documents in a new random order every epoch.
        seed: of that order; none: the run's seed.
        prefetch_batches: batches prepared ahead of the accelerator.
        tokenizer_threads: threads that tokenize; default: one per core.
    """

    source: str = "climbmix"
    text_column: str = "text"
    skip_bad_shards: bool = False
    token_cache: bool = True
    buffer_docs: PositiveInt = 1000
    shuffle: bool = True
    seed: int | None = None
    prefetch_batches: PositiveInt = 4
    tokenizer_threads: PositiveInt | None = None


def parts_of(config: DataConfig) -> list[tuple[float, DataConfig]]:
    """Return the sources of a mixture and their shares; of any other source, it alone."""
    return [(share, dataclasses.replace(config, source=name)) for share, name in mixture.parse(config.source)]


class CorruptShardError(UserError):
    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: {problem}; replace or delete it, or skip it with --set data.skip_bad_shards=true")
        self.path = path


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of documents, or the training or validation part of a source that is a single file.

    Attributes:
        fingerprint: name, size in bytes and times of change (ns): cheap, and different once the file changes.
        part: of a single file, the last 5% (whole blocks if it has several) are the validation split.
    """

    path: Path
    fingerprint: str
    part: Literal["all", "train", "val"] = "all"


def shards_of(config: DataConfig, split: Literal["train", "val"]) -> list[Shard]:
    """Return the shards of a split, in order; of a mixture, those of all sources."""
    if len(parts := parts_of(config)) > 1:
        return [shard for _, part in parts for shard in shards_of(part, split)]
    folder = folder_of(config)
    paths = [folder] if folder.is_file() else _shard_paths(folder)
    part = split
    if len(paths) > 1:
        tests = _named("test", folder, paths)
        val = _named("val|valid|validation|dev|eval", folder, paths) or tests
        train = _named("train|training", folder, paths) or [path for path in paths if path not in (*val, *tests)]
        if not (train and val):
            train, val = paths[:-1], paths[-1:]
        _name_unread(folder, tuple(path for path in paths if path not in (*train, *val)))
        paths, part = (train if split == "train" else val), "all"
    stats = [path.stat() for path in paths]
    return [Shard(p, f"{p.name}:{_version(s)}:{part}", part) for p, s in zip(paths, stats)]


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"  # `cp -p` and `rsync -t` set mtime, but not ctime


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file())


def folder_of(config: DataConfig) -> Path:
    """Return the folder (or the single file) that holds the source's shards, written first if necessary."""
    source, path = config.source, Path(config.source).expanduser()
    if source == "embedded":
        folder = base_dir() / "embedded" / embedded.key()
        build_once(folder, "the embedded corpus", embedded.build)
        return folder
    if source == "climbmix":
        return _climbmix()
    if source.startswith(("hub:", "hf:")):
        return _from_hub(source, config.text_column)
    if not path.exists():
        near = nearest(source, ["embedded", "climbmix"])
        raise UserError(
            f"data.source={source}: no such file or folder{near if 'mean' in near else ''}"
            " (embedded, climbmix, hub:<dataset>, a path, or a mixture: 0.8*climbmix,0.2*/my/texts)"
        )
    shards = _shard_paths(path) if path.is_dir() else [path] * (path.suffix.lower() in SUFFIXES)
    if not shards or not all(_is_parquet(shard) or records.has_plain_lines(shard) for shard in shards):
        return _from_disk(path, config)
    _name_unread(path, tuple(set(_visible_files(path)).difference(shards)))
    return path


def _climbmix() -> Path:
    folder = base_dir() / "climbmix"
    names = [path.name for path in _shard_paths(folder)]
    if not names:
        raise UserError(f"no climbmix shards in {folder}: download them with `{DATA_COMMAND}`")
    if CLIMBMIX_VAL not in names:
        raise UserError(f"{folder / CLIMBMIX_VAL}, the validation split, is missing: download it with `{DATA_COMMAND}`")
    if len(names) == 1:
        raise UserError(f"{folder} holds only the validation shard: download more with `{DATA_COMMAND}`")
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Blocks of a shard


def num_blocks(shard: Shard) -> int:
    return len(_blocks(shard))


def read_block(shard: Shard, index: int, text_column: str) -> list[str]:
    """Return the documents of block `index` that have text."""
    read = _read_parquet if _is_parquet(shard.path) else _read_jsonl
    with _corrupt_if_unreadable(shard.path):
        texts = read(shard, _blocks(shard)[index], text_column)
    if shard.part == "all" or _blocks_in_file(shard.path, shard.fingerprint) > 1:
        return texts
    if len(texts) < 2:
        raise UserError(f"{shard.path}: a single file needs two documents, one for each split")
    cut = len(texts) - _held_out(len(texts))
    return texts[:cut] if shard.part == "train" else texts[cut:]


def texts(config: DataConfig, split: Literal["train", "val"]) -> Iterator[str]:
    """Yield the documents of a split once, in the order of the files; those of a mixture by turns."""
    if len(parts := parts_of(config)) > 1:
        shares = [share for share, _ in parts]
        yield from mixture.interleave(shares, [texts(part, split) for _, part in parts])
        return
    empty = True
    for shard in shards_of(config, split):
        with _skip_if_corrupt(config):
            for block in range(num_blocks(shard)):
                documents = read_block(shard, block, config.text_column)
                empty = empty and not documents
                yield from documents
    if empty:
        raise UserError(f"data.source={config.source}: no documents to read for split {split}")


@contextlib.contextmanager
def _skip_if_corrupt(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except CorruptShardError as error:
        if not config.skip_bad_shards:
            raise
        print(f"warning: skipping the rest of a shard: {error}", flush=True)


def _blocks(shard: Shard) -> range:
    """Return which blocks of its file are the shard's; if there is only one, both splits have a part of it."""
    count = _blocks_in_file(shard.path, shard.fingerprint)
    if shard.part == "all" or count < 2:
        return range(count)
    cut = count - _held_out(count)
    return range(cut) if shard.part == "train" else range(cut, count)


def _held_out(count: int) -> int:
    return max(1, count // 20)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


@functools.cache
def content_hash(path: Path, fingerprint: str) -> str | None:
    """Return the SHA-256 (hex) of a file, about 1 GB a second; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@functools.cache
def _blocks_in_file(path: Path, fingerprint: str) -> int:
    with _corrupt_if_unreadable(path):
        if not _is_parquet(path):
            return len(_jsonl_offsets(path, fingerprint))
        with pq.ParquetFile(path.absolute()) as file:
            return file.metadata.num_row_groups


@contextlib.contextmanager
def _corrupt_if_unreadable(path: Path) -> Iterator[None]:
    try:
        with records.errors_of(path):
            yield
    except records.UnreadableFileError as error:
        raise CorruptShardError(path, error.problem) from None


def _read_parquet(shard: Shard, index: int, text_column: str) -> list[str]:
    with pq.ParquetFile(shard.path.absolute()) as file:
        names = file.schema_arrow.names
        if text_column not in names:
            raise records.no_column(shard.path, text_column, names)
        records.check_names(shard.path, [name for name in names if name == text_column])
        kind = file.schema_arrow.field(text_column).type
        if not records.is_string(kind):
            raise UserError(f"{shard.path}: column {text_column!r} holds {kind}, not text: set data.text_column")
        first_row = 1 + sum(file.metadata.row_group(group).num_rows for group in range(index))
        column = file.read_row_group(index, columns=[text_column]).column(0)
        return [text for text in records.column_values(column, shard.path, first_row) if text]


@functools.cache
def _jsonl_offsets(path: Path, fingerprint: str) -> tuple[int, ...]:
    """Return the byte offset of every 1000th line."""
    offsets, position = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number % JSONL_BLOCK_LINES == 0:
                offsets.append(position)
            position += len(line)
    return tuple(offsets)


def _read_jsonl(shard: Shard, index: int, text_column: str) -> list[str]:
    path, rows = shard.path, []
    with path.open("rb") as file:
        file.seek(_jsonl_offsets(path, shard.fingerprint)[index])
        for number, line in enumerate(itertools.islice(file, JSONL_BLOCK_LINES), index * JSONL_BLOCK_LINES + 1):
            text = records.decode(line, path, f"line {number}").removeprefix("\ufeff" if number == 1 else "")
            rows += [(number, value) for value in records.parse_json(text, path, number)]
    return [text for row in rows if (text := records.text_of(row, text_column, path))]


# ---------------------------------------------------------------------------------------------------------------
# Sources that are written as shards first


def _from_hub(source: str, text_column: str) -> Path:
    name, *rest = source.split(":")[1:]
    if not name or len(rest) > 2:
        raise UserError(f"data.source={source}: expected hub:<dataset>[:<config>[:<split>]]")
    subset, split = [*rest, "", ""][:2]
    texts = _texts_of(_hub_rows(name, subset or None, split or "train"), source, text_column)
    return _written(_slug(f"{name}:{subset}:{split or 'train'}:{text_column}"), texts, source, text_column)


def _from_disk(path: Path, config: DataConfig) -> Path:
    """Return the shards of a file or folder that is not read in place; written anew when it changes."""
    files = _visible_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.source={path}: the folder is empty")
    stats = [(str(file), _version(file.stat())) for file in files if file.exists()]
    key = [str(path.resolve()), config.text_column, config.skip_bad_shards, records.MAX_TEXT_CHARS, stats]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        texts = _texts_of(_saved_rows(path), str(path), config.text_column)
    else:
        texts = _texts_in(path, files, config)
    return _written(f"{_slug(path.stem)}-{digest}", texts, str(path), config.text_column)


def _named(words: str, folder: Path, files: list[Path]) -> list[Path]:
    """Return the files with one of the words in their path below the folder."""
    return [f for f in files if re.search(f"(?<![a-z])({words})(?![a-z])", str(f.relative_to(folder)).lower())]


def _visible_files(folder: Path) -> list[Path]:
    """Return all files under a folder, sorted, and links, which are not followed; not hidden ones and our own."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    files = (file for file in files if base_dir().absolute() not in file.absolute().parents)
    return sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def _texts_in(path: Path, files: list[Path], config: DataConfig) -> Iterator[str]:
    """Yield the documents of the files that can be read; if some are named train, of those alone."""
    chosen = [file for file in files if file.is_file() and records.kind_of(file)]
    chosen = _named("train|training", path, chosen) or chosen
    if not chosen:
        names = ", ".join(sorted({file.suffix or file.name for file in files}))
        raise UserError(f"data.source={path}: expected {records.EXPECTED}, found only {names}")
    _name_unread(path, tuple(file for file in files if file not in chosen))
    for file in chosen:
        with _skip_if_corrupt(config), _corrupt_if_unreadable(file):
            for row in records.read(file):
                yield records.text_of(row, config.text_column, file)


@functools.cache
def _name_unread(folder: Path, files: tuple[Path, ...]) -> None:
    if files and os.environ.get("RANK", "0") == "0":
        names = sorted(str(file.relative_to(folder)) for file in files)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"not read in {folder}: {', '.join(names[:10])}{more}", flush=True)


def _hub_rows(name: str, subset: str | None, split: str) -> Rows:
    import datasets  # takes seconds to import, and few sources need it

    yield from datasets.load_dataset(name, subset, split=split, streaming=True)


def _saved_rows(path: Path) -> Rows:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            names = ", ".join(map(str, saved))
            raise UserError(f"data.source={path}: no split train; name one of {names}: {path}/<split>")
        saved = saved["train"]
    yield from saved


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "__", text).strip("_") or "data"


def _written(name: str, texts: Iterator[str], source: str, text_column: str) -> Path:
    """Write documents as shards. Every hundredth, up to VAL_CHARS in all, is for validation."""
    val: list[str] = []

    def train() -> Iterator[str]:
        val_chars = 0
        for number, text in enumerate(filter(None, texts)):
            if number % 100 == 1 and val_chars < VAL_CHARS:
                val.append(text)
                val_chars += len(text)
            else:
                yield text
        if not val:
            raise UserError(
                f"data.source={source}: needs at least two documents, one for each split (a text file of up to "
                f"{records.MAX_TEXT_CHARS:,} characters is one)"
            )

    def build(target: Path) -> None:  # `val` is complete when it is written: after `train`
        embedded.write_shards(target, train(), val, SHARD_CHARS, column=text_column, row_group_docs=1000)

    folder = base_dir() / "hub" / name
    build_once(folder, source, build)
    return folder


def _texts_of(rows: Rows, source: str, text_column: str) -> Iterator[str]:
    try:
        for row in enumerate(rows, start=1):
            yield records.text_of(row, text_column, f"data.source={source}")
    except UserError:
        raise
    except Exception as error:  # the hub, its caches and its readers fail in dozens of ways: one line for all
        raise UserError(
            f"data.source={source} could not be loaded ({type(error).__name__}: {reason(error)}); check the name "
            "and the network, or use --set data.source=embedded"
        ) from error


def build_once(folder: Path, what: str, build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary folder that becomes `folder` when complete; one process builds, the others wait."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            with contextlib.suppress(ImportError):  # Windows has no fcntl: every process builds its own copy
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when the process dies
            if folder.is_dir():
                return
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            print(f"writing {what} as parquet shards into {folder} (only this once)", flush=True)
            build(temporary)
            os.replace(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # else a process without the lock was faster
            problem = f"{folder} cannot be written ({reason(error)})"
            raise UserError(f"{problem}: free disk space, or set NANOCHAT_BASE_DIR") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
