"""Downloads with huggingface_hub: one file, or the ClimbMix shards in parallel.

A file is written to `<name>.part`, which the next attempt resumes, and renamed once its size, its SHA-256 (where the
hub states one) and its content are right.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanochat.config import NonNegativeFloat, PositiveInt, Settings, UserError
from nanochat.text import reason

CLIMBMIX_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_SHARDS = 6543
SHARD_BYTES = 100_000_000  # about; on disk
DISK_FULL = "the disk is full"
Check = Callable[[Path], str]  # returns "" for a valid file, or what is wrong with it


@dataclasses.dataclass(frozen=True)
class Options(Settings):
    """How to download. The time limit of a connection is huggingface_hub's: HF_HUB_DOWNLOAD_TIMEOUT.

    Attributes:
        workers: files downloaded at the same time.
        attempts: per file.
        backoff_seconds: wait after the first failed attempt; doubled after each further one, up to a minute.
    """

    workers: PositiveInt = 8
    attempts: PositiveInt = 6
    backoff_seconds: NonNegativeFloat = 1.0


def fetch(url: str, path: Path, options: Options = Options(), *, check: Check = lambda _: "") -> None:
    """Download one file to `path`, with a progress bar; the next call resumes what failed or was interrupted."""
    try:
        with tqdm(unit="B", unit_scale=True, desc=path.name) as bar:
            problem = _fetch(url, path, options, check, bar)
    except KeyboardInterrupt:
        raise UserError(f"interrupted; run the command again to resume, {path.parent} keeps what has arrived") from None
    if problem:
        raise UserError(f"{url}: {problem}; run the command again to resume")


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def climbmix(
    folder: Path,
    num_shards: int,
    options: Options = Options(),
    *,
    base_url: str = CLIMBMIX_URL,
    total_shards: int = CLIMBMIX_SHARDS,
) -> int:
    """Download what is missing of the first `num_shards` shards (-1: all) and the last one, the validation split.

    Returns the number of files downloaded. The next call resumes what failed or was interrupted.
    """
    if not (num_shards == -1 or 1 <= num_shards < total_shards):
        raise UserError(f"num_shards={num_shards}: expected 1 to {total_shards - 1}, or -1 for all")
    resume = f"resume with `torchrun launch.py --experiment=data --set num_shards={num_shards}`"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = range(total_shards - 1 if num_shards == -1 else num_shards)
    names = [shard_name(total_shards - 1), *map(shard_name, wanted)]
    missing = [name for name in names if not (folder / name).exists()]
    failed: dict[str, str] = {}
    try:
        with (
            ThreadPool(options.workers) as pool,  # of daemon threads: Ctrl-C does not wait for them
            tqdm(total=_check_space(folder, missing), unit="B", unit_scale=True, disable=not missing) as bar,
        ):

            def fetch_shard(name: str) -> tuple[str, str]:
                return name, _fetch(f"{base_url}/{name}", folder / name, options, _check_parquet, bar)

            # The validation shard comes first and alone: without a network one file fails, not thousands.
            parts = [missing[:1], missing[1:]] if missing[:1] == names[:1] else [missing]
            for part in parts:
                for name, problem in pool.imap_unordered(fetch_shard, part):
                    if problem:
                        failed[name] = problem
                    if problem == DISK_FULL:
                        break
                if failed:
                    break
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {resume}, {folder} keeps what has arrived") from None
    if failed:
        count = sum((folder / name).exists() for name in names)
        problems = "; ".join(f"{name}: {problem}" for name, problem in sorted(failed.items())[:5])
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise UserError(f"{count} of {len(names)} shards are in {folder}; failed: {problems}{more}; {resume}")
    return len(missing)


def _check_space(folder: Path, missing: list[str]) -> int:
    """Return the approximate number of bytes to download."""
    parts = [folder / f"{name}.part" for name in missing]
    needed = len(missing) * SHARD_BYTES - sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {len(missing)} shards need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "set a smaller num_shards, or NANOCHAT_BASE_DIR to a larger disk"
        )
    return max(0, needed)


def _fetch(url: str, path: Path, options: Options, check: Check, bar: tqdm) -> str:
    """Download a file in several attempts; returns "" or why it failed."""
    from huggingface_hub.errors import HfHubHTTPError

    problem = ""
    for attempt in range(options.attempts):
        if attempt:
            time.sleep(min(60.0, options.backoff_seconds * 2 ** (attempt - 1)))
        try:
            problem = _attempt(url, path, check, bar)
            if not problem:
                return ""
        except HfHubHTTPError as error:
            status = error.response.status_code
            problem = f"HTTP {status} {error.response.reason_phrase}"
            if status < 500 and status not in (408, 425, 429):
                return problem
        except Exception as error:  # a worker has to report whatever goes wrong, and the library's errors vary
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return DISK_FULL
            if isinstance(error, OSError) and error.filename:
                return f"{error.filename} cannot be written: {reason(error)}"
            problems = {"ConnectError": "cannot connect; is there a network?", "ReadTimeout": "timed out"}
            problem = problems.get(type(error).__name__) or reason(error)
    return f"{problem} ({options.attempts} attempts)"


def _attempt(url: str, path: Path, check: Check, bar: tqdm) -> str:
    """Download what is missing of a file and verify it; returns "" or what is wrong with its content."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    size = sha256 = None
    try:
        metadata = get_hf_file_metadata(url, token=False)
        size = metadata.size
        sha256 = metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None
    except HfHubHTTPError as error:
        if error.response.status_code not in (405, 501):  # a server that has no HEAD requests
            raise
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as file:
        if size is not None and file.tell() > size:  # of another version
            file.seek(file.truncate(0))
        options: dict[str, Any] = {"headers": {"Accept-Encoding": "identity"}, "expected_size": size}
        options["tqdm_class"] = lambda **_: contextlib.nullcontext(bar)  # all files share one bar
        try:
            http_get(url, file, resume_size=file.tell(), **options)
        except HfHubHTTPError:
            if not file.tell():
                part.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
    with part.open("rb") as file:
        same = sha256 is None or sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    wrong = check(part) if same else "wrong SHA-256"
    if wrong:
        part.unlink()
    else:
        os.replace(part, path)
    return wrong


def _check_parquet(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        last = file.read()
    return "" if first == last == b"PAR1" else "not a parquet file; does a proxy answer in the server's place?"
