"""Run functions and launch.py in fresh processes, as one or several gloo ranks, without waiting for imports.

The processes are forks of a server that has imported torch, orbax and the project (`preload`): one starts in 50 ms
instead of 6 s. A rank that fails ends its job at once: the others are killed, and its traceback is the test's.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
LIMIT_SECONDS = 500.0
"""For jobs and what they are to do: only a hang takes as long, also where others have the cores."""
GRACE_SECONDS = 30.0
"""For the other ranks to exit by themselves when one has failed."""


class Finished(NamedTuple):
    """How a process ended: exit code (negative: the signal), the function's result, standard output and errors."""

    code: int
    value: Any
    out: str
    err: str


class Job:
    """Running ranks of one job; use it as a context manager, which leaves no process behind."""

    def __init__(self, count: int, function: Callable[..., Any], args: tuple, env: Mapping[str, str]):
        context = _server()
        self._folder = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
        if count > 1:
            job |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            job |= {"MASTER_PORT": str(port)}
        self._readers, self.processes = [], []
        for rank in range(count):
            reader, writer = context.Pipe(duplex=False)
            place = job | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
            variables = {**os.environ, **place, **env}
            process = context.Process(target=_child, args=(variables, self._file(rank, ""), function, args, writer))
            process.start()
            writer.close()
            self._readers.append(reader)
            self.processes.append(process)

    def _file(self, rank: int, kind: str) -> str:
        return f"{self._folder.name}/{rank}.{kind}"

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._folder.cleanup()

    def _kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it has started as well
            process.join()

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def until(self, condition: Callable[[], Any], timeout: float = LIMIT_SECONDS) -> None:
        """Wait for a condition that the running job will fulfill."""
        end = time.monotonic() + timeout
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.02)

    def output(self, rank: int = 0) -> str:
        """Return what a rank has printed so far, errors after the rest."""
        paths = [Path(self._file(rank, kind)) for kind in ("out", "err")]
        return "".join(path.read_text() for path in paths if path.exists())  # the process may be just starting

    def wait(self, timeout: float = LIMIT_SECONDS) -> list[Finished]:
        """Return how all ranks ended; those that run on after another has failed, or for too long, are killed."""
        end = time.monotonic() + timeout
        values: dict[int, Any] = {}
        while any(process.is_alive() for process in self.processes) and time.monotonic() < end:
            self._receive(values)
            if any(process.exitcode for process in self.processes):
                end = min(end, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.01)
        self._receive(values)
        self._kill()
        out = [Path(self._file(rank, "out")) for rank in range(len(self.processes))]
        texts = [(path.read_text(), path.with_suffix(".err").read_text()) for path in out]
        codes = [int(process.exitcode or 0) for process in self.processes]
        return [Finished(codes[rank], values.get(rank), *text) for rank, text in enumerate(texts)]

    def _receive(self, values: dict[int, Any]) -> None:
        for rank, reader in enumerate(self._readers):
            with contextlib.suppress(EOFError, OSError):
                while reader.poll():
                    values[rank] = reader.recv()


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = PATH  # the server, which the first start makes, finds `preload` by it
    context.set_forkserver_preload(["preload"])
    return context


def _child(variables: dict[str, str], files: str, function: Callable[..., Any], args: tuple, writer: Connection):
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(files + name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        writer.send(function(*args))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(count: int, function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None) -> Job:
    """Start `function(*args)`, a function at the top of a module, on so many ranks (1: without a group)."""
    return Job(count, function, args, env or {})


def call(count: int, function: Callable[..., Any], *args: Any, timeout: float = LIMIT_SECONDS, **options: Any) -> list:
    """Return what `function(*args)` returns on each of so many ranks; fails with their errors if one fails."""
    with start(count, function, *args, **options) as job:
        finished = job.wait(timeout)
    _check(finished)
    return [f.value for f in finished]


def launch(count: int, *words: str, timeout: float = LIMIT_SECONDS, env: Mapping[str, str] | None = None) -> list[str]:
    """Return what each of so many ranks of `launch.py <words>` printed; fails with their errors if one fails."""
    with start_launch(count, *words, env=env) as job:
        finished = job.wait(timeout)
    _check(finished)
    return [f.out for f in finished]


def start_launch(count: int, *words: str, env: Mapping[str, str] | None = None) -> Job:
    return start(count, _launch, *words, env=env)


def _check(finished: list[Finished]) -> None:
    report = [f"rank {rank}: exit code {f.code}\n{f.out[-1000:]}{f.err[-3000:]}" for rank, f in enumerate(finished)]
    assert not any(f.code for f in finished), "\n".join(report)


def _launch(*words: str) -> None:
    import launch as program

    os.chdir(ROOT)
    sys.argv = [str(ROOT / "launch.py"), *words]
    code = program.main(sys.argv)
    sys.stdout.flush()
    if code:
        sys.exit(code)
