"""Sources of documents: folders of `*.parquet` or `*.jsonl` shards, sorted by name; the last one validates.

The embedded corpus, and what `datasets` loads from the hub or the disk, are written as such a folder on first use. A
shard is read in blocks: a parquet row group, or 1000 lines of jsonl.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import jsonl
from nanochat.config import PositiveInt, Settings, UserError, base_dir, nearest
from nanochat.data import embedded
from nanochat.text import reason

JSONL_BLOCK_LINES = 1000
CLIMBMIX_VAL = "shard_06542.parquet"
SUFFIXES = (".parquet", ".jsonl")
SHARD_CHARS = 250_000_000  # of shards that are written here, about
VAL_CHARS = 10_000_000
DATA_COMMAND = "torchrun launch.py --experiment=data"
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
Rows = Iterator[Any]  # mappings from column to value


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Where documents come from and how they are read.

    Attributes:
        source: embedded, climbmix, a folder of *.parquet / *.jsonl, hub:<dataset>[:<config>[:<split>]], or a local
            path that `datasets` can load.
        text_column: the column (or JSON field) that holds a document's text.
        skip_bad_shards: skip a corrupt shard with a warning instead of stopping.
        token_cache: keep the tokens of documents on disk, so that a second pass does not tokenize again.
        buffer_docs: documents that packing chooses from.
        shuffle: visit shards, blocks and documents in a new random order every epoch.
        prefetch_batches: batches prepared ahead of the accelerator.
        tokenizer_threads: threads that tokenize; default: one per core.
    """

    source: str = "climbmix"
    text_column: str = "text"
    skip_bad_shards: bool = False
    token_cache: bool = True
    buffer_docs: PositiveInt = 1000
    shuffle: bool = True
    prefetch_batches: PositiveInt = 4
    tokenizer_threads: PositiveInt | None = None


class CorruptShardError(UserError):
    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: {problem}; replace or delete it, or skip it with --set data.skip_bad_shards=true")
        self.path = path


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of documents, or the training or validation part of a source that is a single file.

    Attributes:
        fingerprint: name, size in bytes and time of change (ns): cheap, and different once the file changes.
        part: of a single file, the last 5% (whole blocks if it has several) are the validation split.
    """

    path: Path
    fingerprint: str
    part: Literal["all", "train", "val"] = "all"


def shards_of(config: DataConfig, split: Literal["train", "val"]) -> list[Shard]:
    """Return the shards of a split, in order."""
    folder = folder_of(config)
    paths = [folder] if folder.is_file() else _shard_paths(folder)
    part = split
    if len(paths) > 1:
        paths, part = (paths[:-1] if split == "train" else paths[-1:]), "all"
    stats = [path.stat() for path in paths]
    return [Shard(p, f"{p.name}:{s.st_size}:{s.st_mtime_ns}:{part}", part) for p, s in zip(paths, stats)]


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.suffix in SUFFIXES and path.is_file())


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
            " (embedded, climbmix, hub:<dataset> or a path)"
        )
    has_shards = path.suffix in SUFFIXES if path.is_file() else _shard_paths(path)
    return path if has_shards else _from_disk(path, config.text_column)


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
    read = _read_parquet if shard.path.suffix == ".parquet" else _read_jsonl
    with _corrupt_if_unreadable(shard.path):
        texts = read(shard, _blocks(shard)[index], text_column)
    if shard.part == "all" or _blocks_in_file(shard.path, shard.fingerprint) > 1:
        return texts
    if len(texts) < 2:
        raise UserError(f"{shard.path}: a single file needs two documents, one for each split")
    cut = len(texts) - _held_out(len(texts))
    return texts[:cut] if shard.part == "train" else texts[cut:]


def texts(config: DataConfig, split: Literal["train", "val"]) -> Iterator[str]:
    """Yield the documents of a split once, in the order of the files."""
    for shard in shards_of(config, split):
        try:
            for block in range(num_blocks(shard)):
                yield from read_block(shard, block, config.text_column)
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


@functools.cache
def _blocks_in_file(path: Path, fingerprint: str) -> int:
    with _corrupt_if_unreadable(path):
        if path.suffix == ".jsonl":
            return len(_jsonl_offsets(path, fingerprint))
        with pq.ParquetFile(path) as file:
            return file.metadata.num_row_groups


@contextlib.contextmanager
def _corrupt_if_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except jsonl.InvalidLineError as error:
        raise CorruptShardError(path, f"line {error.number} is {error.reason}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptShardError(path, f"unreadable {path.suffix[1:]} ({reason(error)})") from None


def _read_parquet(shard: Shard, index: int, text_column: str) -> list[str]:
    with pq.ParquetFile(shard.path) as file:
        schema = file.schema_arrow
        if text_column not in schema.names:
            raise _no_column(shard.path, text_column, schema.names)
        kind = schema.field(text_column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{shard.path}: column {text_column!r} holds {kind}, not text: set data.text_column")
        return [text for text in file.read_row_group(index, columns=[text_column]).column(0).to_pylist() if text]


def _no_column(path: Path | str, column: str, names: Iterable[str]) -> UserError:
    return UserError(f"{path}: no text column {column!r}, it has {', '.join(names)}: set data.text_column")


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
    path, texts = shard.path, []
    with path.open("rb") as file:
        file.seek(_jsonl_offsets(path, shard.fingerprint)[index])
        lines = list(itertools.islice(file, JSONL_BLOCK_LINES))
    for number, record in jsonl.parse(lines, path, first_number=index * JSONL_BLOCK_LINES + 1):
        if not isinstance(record, dict):
            raise CorruptShardError(path, f"line {number} is not a JSON object")
        if text_column not in record:
            raise _no_column(f"{path} line {number}", text_column, record)
        if not isinstance(text := record[text_column], str | None):
            raise CorruptShardError(path, f"line {number}: {text_column!r} is not text")
        if text:
            texts.append(text)
    return texts


# ---------------------------------------------------------------------------------------------------------------
# Sources that are written as shards first


def _from_hub(source: str, text_column: str) -> Path:
    name, *rest = source.split(":")[1:]
    if not name or len(rest) > 2:
        raise UserError(f"data.source={source}: expected hub:<dataset>[:<config>[:<split>]]")
    subset, split = [*rest, "", ""][:2]
    rows = _stream(name, subset or None, split=split or "train")
    return _written(_slug(f"{name}:{subset}:{split or 'train'}:{text_column}"), rows, source, text_column)


def _from_disk(path: Path, text_column: str) -> Path:
    """Return the shards of a file or folder that `datasets` loads; written anew when it changes."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.source={path}: the folder is empty")
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([str(path.resolve()), text_column, stats]).encode()).hexdigest()[:16]
    return _written(f"{_slug(path.stem)}-{digest}", _local_rows(path), str(path), text_column)


def _stream(*args: Any, **options: Any) -> Rows:
    import datasets  # takes seconds to import, and few sources need it

    yield from datasets.load_dataset(*args, streaming=True, **options)


def _local_rows(path: Path) -> Rows:
    kinds = {".csv": "csv", ".json": "json", ".txt": "text"}
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if "train" not in saved:
                names = ", ".join(map(str, saved))
                raise UserError(f"data.source={path}: no split train; name one of {names}: {path}/<split>")
            saved = saved["train"]
        yield from saved
    elif path.is_dir():
        yield from _stream(str(path), split="train")
    elif path.suffix in kinds:
        yield from _stream(kinds[path.suffix], data_files=str(path), split="train")
    else:
        raise UserError(f"data.source={path}: expected a folder or a file of .parquet, .jsonl, {', '.join(kinds)}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "__", text).strip("_") or "data"


def _written(name: str, rows: Rows, source: str, text_column: str) -> Path:
    """Write the documents of `rows` as shards. Every hundredth, up to VAL_CHARS in all, is for validation."""
    val: list[str] = []

    def train() -> Iterator[str]:
        val_chars = 0
        for number, text in enumerate(_texts_of(rows, source, text_column)):
            if number % 100 == 1 and val_chars < VAL_CHARS:
                val.append(text)
                val_chars += len(text)
            else:
                yield text
        if not val:
            raise UserError(f"data.source={source}: needs at least two documents, one for each split")

    def build(target: Path) -> None:  # `val` is complete when it is written: after `train`
        embedded.write_shards(target, train(), val, SHARD_CHARS, column=text_column, row_group_docs=1000)

    folder = base_dir() / "hub" / name
    build_once(folder, source, build)
    return folder


def _texts_of(rows: Rows, source: str, text_column: str) -> Iterator[str]:
    try:
        for row in rows:
            if text_column not in row:
                raise _no_column(f"data.source={source}", text_column, row)
            text = row[text_column]
            if not isinstance(text, str | None):
                raise UserError(f"data.source={source}: column {text_column!r} is not text: set data.text_column")
            if text:
                yield text
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
