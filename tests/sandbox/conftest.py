"""Fixtures that check what a run leaves behind."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_runs import adopt_orphans, descriptors, processes

from nanochat.sandbox import bubblewrap as sandbox


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


@pytest.fixture
def kernel(mark: str) -> str:
    """Skip the test if the kernel does not isolate."""
    if reason := sandbox.available():
        pytest.skip(reason)
    return mark
