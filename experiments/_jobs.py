"""Benchmarks in subprocesses: each with a time limit, its result as JSON, its failure as one line."""

import contextlib
import importlib
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

from nanochat import config as configs

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = re.compile(r"(RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|TORCHRUN_)")


class RunResult(NamedTuple):
    """The JSON of the last `{"bench": ...}` line, one line with the error or "", and all lines.

    Of a benchmark that failed or was stopped, the JSON is what it had measured until then.
    """

    result: dict[str, Any] | None
    error: str
    lines: list[str]


def run_subprocess(
    command: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None, log: Path | None = None
) -> RunResult:
    """Run a command without this process's torchrun variables; after `seconds` it and its children are stopped.

    Args:
        env: additional environment variables. log: file for its output, to keep.
    """
    inherited = {name: value for name, value in os.environ.items() if not TORCHRUN.match(name)}
    env = inherited | {"PYTHONUNBUFFERED": "1"} | dict(env or {})  # a stopped process has printed all it had
    encoding: Any = {"encoding": "utf-8", "errors": "replace"}
    with log.open("w+", **encoding) if log else tempfile.TemporaryFile("w+", **encoding) as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop_process(process)
        file.seek(0)
        lines = file.read().splitlines()
    error = ""
    if code is None:
        error = f"stopped after {seconds:.0f} s"
    elif code:
        error = _error_line(lines) or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
    return RunResult(_last_result(lines), error, lines)


def run_in_process(command: Sequence[str], runtime: Any, log: Path) -> RunResult:
    """Run the experiment that a `launch_command` starts here instead, as quick as that is; keep its output in `log`."""
    words = command[command.index(str(ROOT / "launch.py")) + 1 :]
    module = importlib.import_module(f"experiments.{words[0].partition('=')[2]}")
    error = ""
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            module.run(configs.override(module.config(), words[2::2]), runtime)
        except Exception as caught:  # of a unit, which does not stop the others
            error = f"{caught}" if isinstance(caught, configs.UserError) else f"{type(caught).__name__}: {caught}"
    lines = log.read_text(encoding="utf-8").splitlines()
    return RunResult(_last_result(lines), error, lines)


def _last_result(lines: Sequence[str]) -> dict[str, Any] | None:
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a process was stopped within its line
            if line.startswith('{"bench"'):
                return json.loads(line, parse_constant=lambda _: None)  # of NaN
    return None


def stop_process(process: subprocess.Popen) -> None:
    """Terminate, then kill, a process that was started in its own session, and its children."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    with contextlib.suppress(ProcessLookupError):  # children may outlive it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _error_line(lines: Sequence[str]) -> str:
    for pattern in (r"error: .+", r"(?!.*ChildFailedError)[\w.]*(Error|Exception|Exit|Interrupt)\b.*"):
        for line in lines:
            text = re.sub(r"^\[rank\d+\]:\s*", "", line).strip()
            if re.fullmatch(pattern, text):
                return text.removeprefix("error: ")[:200]
    return ""


def launch_command(experiment: str, settings: Mapping[str, Any], ranks: int = 1) -> list[str]:
    """Return the command that starts an experiment on `ranks` ranks of this machine; settings by dotted name."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={_cli_value(value)}")]
    return [sys.executable, *torchrun, str(ROOT / "launch.py"), f"--experiment={experiment}", *flags]


def _cli_value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_cli_value(item).replace(",", r"\,") for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
