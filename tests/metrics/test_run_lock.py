"""One owner of a folder: processes of this machine, killed ones, other machines, restarts by torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.config import UserError
from nanochat.metrics import run_lock

HOLD = """
import sys, time
from pathlib import Path
from nanochat.metrics import run_lock
with run_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "GRACE_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.02)


@contextlib.contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_second_process_is_refused_and_a_killed_one_frees_the_lock_at_once(tmp_path: Path) -> None:
    with other_process(tmp_path) as first:
        assert first.stdout and first.stdout.readline() == "held\n"
        name = rf"process {first.pid} on {os.uname().nodename} since \d{{4}}-.*; wait for it, stop it, or --set name="
        with pytest.raises(UserError, match=name), run_lock.held(tmp_path):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert json.loads((tmp_path / run_lock.FILE).read_text())["pid"] == first.pid
        start = time.monotonic()
        with run_lock.held(tmp_path) as check:
            check()
        assert time.monotonic() - start < 20  # of 60, on a busy machine too
    assert (tmp_path / run_lock.FILE).read_text() == "", "released"


def test_of_processes_that_start_at_the_same_time_one_gets_the_lock(tmp_path: Path) -> None:
    barrier, results = threading.Barrier(8), []

    def start() -> None:
        barrier.wait()
        try:
            with run_lock.held(tmp_path / "run"):
                results.append("held")
                barrier.wait()
        except UserError as error:
            results.append(str(error).partition(" since")[0])
            barrier.wait()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = f"{tmp_path / 'run'} is in use by process {os.getpid()} on {os.uname().nodename}"
    assert sorted(results) == sorted(["held", *[refused] * 7])


def foreign(folder: Path, **changes: Any) -> Path:
    """Leave the lock as another machine does, whose flock does not reach this one."""
    record = {
        "host": "node7",
        "pid": 1,
        "since": "2026-07-01 12:00:00+00:00",
        "machine": "other",
        "id": uuid.uuid4().hex,
    }
    path = folder / run_lock.FILE
    path.write_text(json.dumps({**record, **changes}))
    return path


def test_silent_owner_on_another_machine_is_waited_for(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 0.3)
    foreign(tmp_path)
    start = time.monotonic()
    with run_lock.held(tmp_path):
        assert time.monotonic() - start > 0.25
    assert (
        "in use by process 1 on node7 since 2026-07-01 12:00:00+00:00: watching for up to 0 s"
        in capsys.readouterr().out
    )


def test_owner_that_has_been_silent_for_long_is_not_waited_for(tmp_path: Path) -> None:
    past = time.time() - 61
    os.utime(foreign(tmp_path), (past, past))
    with run_lock.held(tmp_path):
        pass


def test_owner_on_another_machine_that_shows_a_sign_of_life_is_respected(tmp_path: Path, monkeypatch) -> None:
    path, sleep = foreign(tmp_path), time.sleep
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: (sleep(seconds), os.utime(path)))
    with pytest.raises(UserError, match="in use by process 1 on node7"), run_lock.held(tmp_path):
        pass
    assert json.loads(path.read_text())["host"] == "node7"


def test_same_process_number_in_another_container_or_after_a_reboot_is_not_its_owner(tmp_path: Path) -> None:
    foreign(tmp_path, pid=os.getpid(), machine=run_lock._machine())  # dead, as nobody has its flock
    with run_lock.held(tmp_path):
        pass


def test_restart_by_torchrun_takes_over_from_its_own_job_on_another_node(tmp_path: Path, monkeypatch) -> None:
    foreign(tmp_path, id="ours")
    monkeypatch.setattr(run_lock, "was_restarted", lambda key: key == "lock ours")
    with run_lock.held(tmp_path):
        pass


@pytest.mark.parametrize("code", [run_lock.errno.ENOTSUP, run_lock.errno.ENOLCK])
def test_disk_without_flock_goes_by_signs_of_life(tmp_path: Path, monkeypatch, code: int) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 0.3)
    refused = pytest.raises(UserError, match=f"in use by process {os.getpid()}")
    with run_lock.held(tmp_path), refused, run_lock.held(tmp_path):
        pass


def test_owner_that_lost_the_lock_stops_before_it_saves(tmp_path: Path) -> None:
    with run_lock.held(tmp_path) as check:
        path = foreign(tmp_path)
        with pytest.raises(UserError, match=r"was taken over by process 1 on node7 .*; this job stops without saving"):
            check()
    assert json.loads(path.read_text())["host"] == "node7", "the other one's lock stays"


def test_damaged_or_removed_lock_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / run_lock.FILE).write_text("{")
    with run_lock.held(tmp_path) as check:
        (tmp_path / run_lock.FILE).unlink()
        check()


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=r"file/run/run.lock cannot be written: Not a directory")
    with refused, run_lock.held(tmp_path / "file" / "run"):
        pass
