"""Run a program on several gloo ranks of this machine, as torchrun would.

The ranks are forks of one process that has imported what the program imports: that takes longer than most of the tests.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 10
"""For the other ranks to end when one has failed."""


class Ended(NamedTuple):
    """How a job ended: exit code, output and errors of each rank."""

    codes: list[int]
    outs: list[str]
    errors: list[str]


def run(ranks: int, program: str, *args: str, timeout: float = 280) -> list[str]:
    """Return what each rank of `python tests/<program> <args>` printed; fails with the errors if one fails."""
    ended = end(ranks, program, *args, timeout=timeout)
    said = "\n".join(f"rank {rank}\n{error[-3000:]}" for rank, error in enumerate(ended.errors))
    assert ended.codes == [0] * ranks, f"exit codes {ended.codes}\n{said}"
    return ended.outs


def end(ranks: int, program: str, *args: str, timeout: float = 280) -> Ended:
    """Return how the ranks of `python tests/<program> <args>` ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    job |= {
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            str(ranks),
            folder,
            str(
                next(
                    f for f in (Path(__file__).parent / program, ROOT / program, ROOT / "tests" / program) if f.exists()
                )
            ),
            *args,
        ]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=os.environ | job, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)
        try:
            said, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGALRM)  # its ranks end, and it says how
            said, error = process.communicate(timeout=GRACE_SECONDS)
        assert process.returncode == 0, error
        outs, errors = ([path.read_text() for path in sorted(Path(folder).glob(kind))] for kind in ("out*", "err*"))
    return Ended(json.loads(said), outs, errors)


def main() -> None:
    """Fork the ranks, and print their exit codes."""
    count, folder, program = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(program).parent)
    for word in sys.argv:
        if word.startswith("--experiment="):  # the launcher imports it when it is known
            importlib.import_module(f"experiments.{word.partition('=')[2]}")
    runpy.run_path(program, run_name="imported")
    children = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{name}{rank:03d}", os.O_WRONLY | os.O_CREAT), number)
            runpy.run_path(program, run_name="__main__")
            return
        children[pid] = rank

    def end_all(*_: object) -> None:
        for pid in children:
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end_all)
    codes = [0] * count
    while children:
        pid, status = os.wait()
        codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            signal.alarm(GRACE_SECONDS)
    signal.alarm(0)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
