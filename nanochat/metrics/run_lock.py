"""The lock of a folder that one job at a time may write: `run.lock` in it names the host, the process and the time.

Among the processes of a machine the kernel's lock on that file (flock) decides: it is free as soon as its owner is
dead. Not all shared disks pass flock on to other machines. So the owner also touches the file every few seconds, and a
job on another machine takes over once that has stopped. Where flock does not reach and two machines start at the same
instant, both may get the lock: the first of them stops at its next `check`, before it saves.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat.config import UserError
from nanochat.distributed import control_group, mark_restart, raise_on_any_failure, was_restarted
from nanochat.text import reason

FILE = "run.lock"
TOUCH_SECONDS = 5.0
LEASE_SECONDS = 60.0  # after so long without a touch, an owner on another machine is dead
GRACE_SECONDS = 2.0  # for an owner on this machine to exit, or to write its name
RECORD_BYTES = 512  # the same for all records, so that one write replaces one

Record = dict[str, Any]  # host, pid, since, machine, id


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder, creating the folder, until the block ends. A collective call; rank 0 takes the lock.

    Yields a function, a collective call too, that raises a UserError if another job has taken the lock over.
    Raises a UserError that names the owner if it is alive; one on another machine may be waited for.
    """
    path = folder / FILE
    with contextlib.ExitStack() as stack:
        own: Record = {}
        with raise_on_any_failure():
            if control_group().rank == 0:
                try:
                    own = stack.enter_context(_taken(path))
                except OSError as error:
                    raise UserError(f"{path} cannot be written: {reason(error)}") from None

        def check() -> None:
            with raise_on_any_failure():
                owner = _read(path) if own else {}
                if owner and owner != own:
                    raise UserError(f"{folder} was taken over by {_name(owner)}; this job stops without saving")

        yield check


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[Record]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _open_when_free(path)
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    own = {"host": platform.node(), "pid": os.getpid(), "since": since, "machine": _machine(), "id": uuid.uuid4().hex}
    os.pwrite(file, json.dumps(own).encode().ljust(RECORD_BYTES), 0)
    mark_restart(f"lock {own['id']}")
    end = threading.Event()
    thread = threading.Thread(target=_touch, args=(file, end), daemon=True)
    thread.start()
    try:
        yield own
    finally:
        end.set()
        thread.join()
        if _read(path) == own:
            os.ftruncate(file, 0)  # so that a job on another machine need not wait
        os.close(file)


def _open_when_free(path: Path) -> int:
    """Return the locked file, or raise a UserError if its owner is alive."""
    began, first = time.monotonic(), None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_free, owner, touched = _flock(file), _read(path), os.fstat(file).st_mtime
        with tempfile.TemporaryFile(dir=path.parent) as new:
            age = os.fstat(new.fileno()).st_mtime - touched  # by the disk's clock
        waited, is_here = time.monotonic() - began, owner.get("machine") == _machine()
        is_ours = bool(owner) and was_restarted(f"lock {owner.get('id')}")  # torchrun restarts the job
        if is_free is not False and (not owner or is_ours or (is_here and is_free) or max(age, waited) > LEASE_SECONDS):
            return file
        os.close(file)
        is_near = is_free is not None and (is_here or not owner)
        if first is None and not is_near:
            print(f"{path.parent} is in use by {_name(owner)}: watching for up to {LEASE_SECONDS:.0f} s", flush=True)
        first = first or (owner, touched)
        is_alive = first != (owner, touched) and not is_near and not is_ours
        if is_alive or waited > (GRACE_SECONDS if is_near else 3 * LEASE_SECONDS):
            raise UserError(f"{path.parent} is in use by {_name(owner)}; wait for it, stop it, or --set name=<other>")
        time.sleep(min(0.2, GRACE_SECONDS))


def _flock(file: int) -> bool | None:
    """Return whether the kernel gives this process the lock; None if the disk has no such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None


def _touch(file: int, end: threading.Event) -> None:
    while not end.wait(TOUCH_SECONDS):
        with contextlib.suppress(OSError):  # a network disk may be away for a moment
            os.utime(file)


def _read(path: Path) -> Record:
    """Return the owner; {} if there is none."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _machine() -> str:
    """Return an id that is the same in all containers of a machine, and another after a reboot."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text().strip() if boot_id.exists() else platform.node()


def _name(owner: Record) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
