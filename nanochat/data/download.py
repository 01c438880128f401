"""Download with retries, of one file or of the ClimbMix shards in parallel; checked before a file gets its name.

A file is written to `<name>.part` and renamed once its size, its SHA-256 (where the hub states one) and its content,
as far as its kind shows, are right. Whatever stops a download, running it again goes on from the bytes that are there.
"""

import dataclasses
import errno
import hashlib
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import requests
from tqdm import tqdm

from nanochat.config import UserError

CLIMBMIX_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_SHARDS = 6543
SHARD_BYTES = 100_000_000
"""About what a shard takes on disk."""
CHUNK_BYTES = 1 << 16
"""Written at once; at most this much is lost when a connection breaks."""
PARQUET_MARK = b"PAR1"
Check = Callable[[Path], str]
"""Given a complete file, returns "" or what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to download.

    Attributes:
        workers: files fetched at the same time.
        attempts: tries per file.
        timeout_seconds: silence after which a connection counts as stalled.
        backoff_seconds: wait after the first failure; doubled after each further one, up to a minute.
    """

    workers: int = 8
    attempts: int = 6
    timeout_seconds: float = 30.0
    backoff_seconds: float = 1.0


class _TryAgain(Exception):
    """A failure that may pass; `wait_seconds` is what the server asked for."""

    def __init__(self, reason: str, wait_seconds: float = 0.0):
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class _GiveUp(Exception):
    """A failure that trying again does not mend."""


def fetch(url: str, path: Path, options: Options = Options(), *, check: Check = lambda _: "") -> None:
    """Fetch the file at `url` and give it the name `path`.

    Args:
        path: where it goes; its folder is created if need be.
        options: attempts and times.
        check: of the content; a wrong file is thrown away, and fetched again.

    Raises:
        UserError: it could not be fetched, or Ctrl-C; running it again goes on from what has arrived.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error.strerror or error})") from None
    try:
        with requests.Session() as session, tqdm(unit="B", unit_scale=True, desc=path.name) as bar:
            session.headers["Accept-Encoding"] = "identity"
            reason = _fetch_with_retries(session, url, path, options, threading.Event(), bar.update, check)
    except KeyboardInterrupt:
        raise UserError(f"stopped; what has arrived stays in {path.parent}, the same command goes on") from None
    if reason:
        raise UserError(f"{url}: {reason}; the same command goes on with what has arrived")


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard_{index:05d}.parquet"


def climbmix(
    folder: Path,
    num_shards: int,
    options: Options = Options(),
    *,
    base_url: str = CLIMBMIX_URL,
    total_shards: int = CLIMBMIX_SHARDS,
) -> int:
    """Make sure that the first `num_shards` shards and the last one, which validates, lie in `folder`.

    Args:
        folder: where the shards go; created if need be.
        num_shards: number of training shards; -1 for all.
        options: workers, attempts and times.
        base_url: the address in front of `/shard_00000.parquet`.
        total_shards: shards that exist there.

    Returns:
        How many files were fetched now.

    Raises:
        UserError: no room on the disk, files that could not be fetched, or Ctrl-C: each with how to go on.
    """
    if not (num_shards == -1 or 1 <= num_shards < total_shards):
        raise UserError(f"num_shards={num_shards}: expected 1 to {total_shards - 1}, or -1 for all")
    wanted = range(total_shards - 1 if num_shards == -1 else num_shards)
    again = f"`torchrun launch.py --experiment=data --set num_shards={num_shards}`"
    folder.mkdir(parents=True, exist_ok=True)
    # The validation shard comes first and alone: without a network one file fails, not thousands.
    names = [shard_name(total_shards - 1), *map(shard_name, wanted)]
    missing = [name for name in names if not (folder / name).exists()]
    about_bytes = _check_room(folder, missing)
    first = missing[:1] if missing[:1] == names[:1] else []
    with tqdm(total=about_bytes, unit="B", unit_scale=True, disable=not missing) as bar:
        failures = _fetch_shards(base_url, folder, first, options, bar, again)
        if not failures:
            failures = _fetch_shards(base_url, folder, missing[len(first) :], options, bar, again)
    if failures:
        here = sum((folder / name).exists() for name in names)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(failures.items())[:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise UserError(f"{here} of {len(names)} shards are in {folder}; failed: {reasons}{more}; go on with {again}")
    return len(missing)


def _check_room(folder: Path, missing: list[str]) -> int:
    """Return about how many bytes are to come."""
    parts = [folder / f"{name}.part" for name in missing]
    needed = len(missing) * SHARD_BYTES - sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {len(missing)} shards need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "set a smaller num_shards, or NANOCHAT_BASE_DIR to a larger disk"
        )
    return max(0, needed)


def _fetch_shards(
    base_url: str, folder: Path, names: list[str], options: Options, bar: tqdm, again: str
) -> dict[str, str]:
    """Fetch files with several threads; returns {name: why it failed}."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    stop = threading.Event()
    for name in names:
        todo.put(name)

    def work() -> None:
        with requests.Session() as session:
            session.headers["Accept-Encoding"] = "identity"  # sizes and ranges count the bytes of the file itself
            while not stop.is_set():
                try:
                    name = todo.get_nowait()
                except queue.Empty:
                    return
                reason = _fetch_with_retries(
                    session, f"{base_url}/{name}", folder / name, options, stop, bar.update, _not_parquet
                )
                done.put((name, reason))

    failures: dict[str, str] = {}
    finished = 0
    # Daemon threads: Ctrl-C need not wait for a stalled connection. What they wrote is in the .part files.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(options.workers, len(names)))]
    try:
        for thread in threads:
            thread.start()
        for _ in names:
            name, reason = done.get()
            if reason:
                failures[name] = reason
                if stop.is_set():  # the disk is full: no file can be finished
                    break
            else:
                finished += 1
                bar.set_postfix_str(f"{finished} of {len(names)} shards")
    except KeyboardInterrupt:
        raise UserError(f"stopped; what has arrived stays in {folder}, go on with {again}") from None
    finally:
        stop.set()
    return failures


def _fetch_with_retries(
    session: requests.Session,
    url: str,
    path: Path,
    options: Options,
    stop: threading.Event,
    received: Callable[[int], object],
    check: Check,
) -> str:
    """Fetch one file, calling `received(num_bytes)` on the way; returns "" or why it failed."""
    reason = ""
    for attempt in range(options.attempts):
        wait = 0.0
        try:
            for count in _attempt(session, url, path, options.timeout_seconds, check):
                received(count)
                if stop.is_set():
                    return "stopped"
            return ""
        except _TryAgain as error:
            reason, wait = str(error), error.wait_seconds
        except _GiveUp as error:
            return str(error)
        except requests.RequestException as error:
            reason = _describe(error)
        except (ConnectionError, TimeoutError) as error:  # the odd one that `requests` lets through
            reason = str(error)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                stop.set()
                return "the disk is full"
            return f"cannot write: {error.strerror or error}"
        except Exception as error:  # a thread must always report back
            return f"{type(error).__name__}: {error}"
        if attempt + 1 < options.attempts:
            stop.wait(min(60.0, max(wait, options.backoff_seconds * 2**attempt)))
        if stop.is_set():
            return "stopped"
    return f"{reason} ({options.attempts} attempts)"


def _describe(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "timed out"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.ConnectionError):
        return "timed out" if "timed out" in str(error).lower() else "cannot connect; is there a network?"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _attempt(session: requests.Session, url: str, path: Path, timeout_seconds: float, check: Check) -> Iterator[int]:
    """Fetch what is missing of one file, check it and give it its name; yields the number of bytes of each piece."""
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=timeout_seconds) as response:
        size, sha256 = _promised(response)
        if response.status_code == 416 and have:
            if size != have:  # longer than the file is now: not a beginning of it
                part.unlink()
                raise _TryAgain("the server has another version than the partial file")
        else:
            _check_status(response)
            resumed = response.status_code == 206
            if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink(missing_ok=True)
                raise _TryAgain("the server sent another range than asked for")
            # Unbuffered, so that a killed process leaves all that has arrived. A server without ranges starts over.
            with part.open("ab" if resumed else "wb", buffering=0) as file:
                for chunk in response.iter_content(CHUNK_BYTES):
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                    yield len(chunk)
                os.fsync(file.fileno())
    _verify(part, size, sha256, check)
    os.replace(part, path)


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        asked = response.headers.get("Retry-After", "")
        raise _TryAgain(f"HTTP {status}", float(asked) if asked.isdigit() else 0.0)
    if status not in (200, 206):
        raise _GiveUp(f"HTTP {status} {response.reason}")


def _promised(response: requests.Response) -> tuple[int | None, str | None]:
    """Return the whole file's size in bytes and its SHA-256, as far as the server states them.

    The hub answers with a redirect whose x-linked headers describe the file itself.
    """
    size, sha256 = None, None
    for answer in [*response.history, response]:
        linked_size = answer.headers.get("x-linked-size", "")
        etag = answer.headers.get("x-linked-etag", "").strip('W/"').lower()
        size = int(linked_size) if linked_size.isdigit() else size
        sha256 = etag if re.fullmatch("[0-9a-f]{64}", etag) else sha256
    if size is None:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        length = response.headers.get("Content-Length", "")
        if total.isdigit():
            size = int(total)
        elif response.status_code == 200 and length.isdigit():
            size = int(length)
    return size, sha256


def _verify(part: Path, size: int | None, sha256: str | None, check: Check) -> None:
    """Check a complete file; one that is too short stays for the next attempt, a wrong one is removed."""
    have = part.stat().st_size
    if size is not None and have < size:
        raise _TryAgain(f"the connection broke off after {have} of {size} bytes")
    if size is not None and have > size:
        wrong = f"{have} bytes instead of {size}"
    elif sha256 is not None and _sha256(part) != sha256:
        wrong = "wrong SHA-256"
    else:
        wrong = check(part)
    if wrong:
        part.unlink()
        raise _TryAgain(wrong)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_parquet(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(len(PARQUET_MARK))
        file.seek(max(0, path.stat().st_size - len(PARQUET_MARK)))
        last = file.read()
    return "" if first == last == PARQUET_MARK else "not a parquet file; does a proxy answer in the server's place?"
