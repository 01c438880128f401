"""Benchmarks as processes of their own: each with a time limit, its result as JSON, its failure as one line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """How a job ended: the JSON of the last line that has one, or None and one line of what went wrong."""

    result: dict[str, Any] | None
    problem: str


def job(command: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None) -> Outcome:
    """Run a benchmark as a process of its own, so that its failure, or its memory, stays its own.

    Args:
        command: its words; torchrun's variables of this process are not passed on. seconds: after which it is stopped.
        env: variables to set beside those of this process.
    """
    ours = re.compile(r"(RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|TORCHRUN_)")
    clean = {name: value for name, value in os.environ.items() if not ours.match(name)} | dict(env or {})
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=clean, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
        file.seek(0)
        lines = file.read().splitlines()
    if code is None:
        return Outcome(None, f"stopped after {seconds:.0f} s")
    if code:
        return Outcome(None, _problem(lines) or (f"killed by signal {-code}" if code < 0 else f"exit code {code}"))
    result = next((json.loads(line) for line in reversed(lines) if line.startswith('{"bench"')), None)
    return Outcome(result, "" if result else "it printed no result")


def stop(process: subprocess.Popen) -> None:
    """End a process that was started in a session of its own: kindly, then by force; its children with it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    with contextlib.suppress(ProcessLookupError):  # what is left of its group, also after a good end
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _problem(lines: Sequence[str]) -> str:
    """Return the line of a failed job's output that says why."""
    for pattern in (r"error: .+", r"(?!.*ChildFailedError)[\w.]*(Error|Exception|Exit|Interrupt)\b.*"):
        for line in lines:
            text = re.sub(r"^\[rank\d+\]:\s*", "", line).strip()
            if re.fullmatch(pattern, text):
                return text.removeprefix("error: ")[:200]
    return ""


def command(launch: Path, experiment: str, values: Mapping[str, Any], ranks: int) -> list[str]:
    """Return the words that start an experiment on some ranks of this machine.

    Args:
        launch: the file launch.py. values: settings by dotted name.
    """
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(launch), f"--experiment={experiment}"]
    return words + [word for name, value in values.items() for word in ("--set", f"{name}={text(value)}")]


def text(value: Any) -> str:
    """Return a setting's value as it is written on the command line."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
