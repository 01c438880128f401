"""Runs in the sandbox, their processes, and systems that lack a part of it."""

import contextlib
import ctypes
import functools
import os
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.config import UserError
from nanochat.sandbox import Result, seccomp
from nanochat.sandbox import bubblewrap as sandbox


def processes(mark: str) -> list[int]:
    """Return the processes whose command line contains `mark`."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # exited meanwhile
            if mark.encode() in entry.read_bytes():
                pids.append(int(entry.parent.name))
    return pids


def wait_for_processes(mark: str, count: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while len(processes(mark)) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(processes(mark)) == count


def descriptors() -> dict[str, str]:
    """Return {descriptor: what it is} of this process."""
    targets = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            targets[entry] = os.readlink(f"/proc/self/fd/{entry}")
    return targets


def adopt_orphans(adopt: bool) -> None:
    """Be for orphaned processes what process 1 of a container is: a new parent that does not reap them."""
    set_child_subreaper = 36
    assert ctypes.CDLL(None).prctl(set_child_subreaper, ctypes.c_ulong(adopt), 0, 0, 0) == 0


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Mark the processes of a test, and check that no process, descriptor, mount or temporary file is left."""
    mark, text = f"# {uuid.uuid4()}", sandbox._jail()
    monkeypatch.setattr(sandbox, "_jail", lambda: f"{text}\n{mark}\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before, mounts = descriptors(), Path("/proc/self/mounts").read_text()
    adopt_orphans(True)
    yield mark
    adopt_orphans(False)
    assert processes(mark) == []
    assert descriptors() == before
    assert os.listdir(temporary) == []
    assert Path("/proc/self/mounts").read_text() == mounts
    with contextlib.suppress(ChildProcessError):
        assert os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None  # no zombie either


def need_libseccomp() -> None:
    """Skip the test if the library is not installed; that it fails is no reason."""
    try:
        ctypes.CDLL(seccomp.LIBRARY)
    except OSError:
        pytest.skip(f"needs {seccomp.LIBRARY}")


@pytest.fixture
def kernel(mark: str) -> str:
    """Skip the test if the kernel does not isolate."""
    if reason := sandbox.available():
        pytest.skip(reason)
    return mark


def run(code: str, **options: float) -> Result:
    return sandbox.run(textwrap.dedent(code), **options)  # type: ignore[arg-type]


ATTEMPT = """
import ctypes, os
def attempt(function, *arguments):
    try:
        print("ALLOWED", function, arguments, function(*arguments))
    except OSError as error:
        print("refused:", os.strerror(error.errno))
"""


def clear_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((sandbox, "available"), (sandbox, "command"), (seccomp, "compile_filter")):
        cached = getattr(module, name)
        monkeypatch.setattr(module, name, functools.cache(cached.__wrapped__))


def assert_unavailable(match: str) -> None:
    assert match in str(sandbox.available())
    with pytest.raises(UserError, match="weak=True"):
        run("pass")
    assert run("print(1)", weak=True).success


def break_jail(monkeypatch: pytest.MonkeyPatch, call: str, failing_call: str) -> None:
    """Replace a system call of the jail by one that this kernel does not have."""
    text = sandbox._jail()
    assert call in text
    monkeypatch.setattr(sandbox, "_jail", lambda: text.replace(call, failing_call))
