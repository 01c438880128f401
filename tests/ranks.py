"""Run a program on several gloo ranks of this machine, as torchrun would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(ranks: int, program: str, *args: str, timeout: float = 280) -> list[str]:
    """Return what each rank of `python tests/<program> <args>` printed; fails with the errors if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in range(ranks):
        env = os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(ROOT / "tests" / program), *args]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=pipe, stderr=pipe))
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks, "\n".join(
        f"rank {r} exit {c}\n{e[-3000:]}" for r, (c, (_, e)) in enumerate(zip(codes, results))
    )
    return [out for out, _ in results]
