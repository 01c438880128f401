"""Run Python that a model wrote, in a process that the Linux kernel keeps away from everything else.

Each program gets a fresh interpreter with the standard library. What holds it, from the outside inwards:
    bubblewrap   user, mount, process, network, IPC and host name namespaces of its own. It sees the interpreter and
                 the system's libraries, read-only: no /home, no /etc, no /proc, no environment of ours, no network.
    a tmpfs      /tmp, the one place to write, in memory, with a limit on bytes and on files; gone with the process.
    rlimits      memory, processor time, file size, open files, no core dump.
    seccomp      an allow-list of system calls: no second process, no program, no socket (`nanochat.seccomp`).
    the parent   wall time and output; when one is used up, the namespace and all in it are killed.

A program counts as successful only if it ran to its last line: what leaves earlier, `sys.exit(0)` and `os._exit(0)`
too, does not. Not promised: a program written to deceive its own check can, since both run in one interpreter, find
the secret that says so among the open descriptors. Nor that a hole in the kernel itself is closed.

Where the kernel or the machine cannot do this, `run` refuses and `available` says why. `weak=True` accepts less: the
rlimits, a process group, an empty environment and a temporary folder, and the system call filter if libseccomp is
there. It contains mistakes; a hostile program can then read files, and signal processes of the same user.

    python -m nanochat.sandbox program.py

What a sandboxed program is started with: bubblewrap's command line, the environment, and the interpreter.

Source: the manual page bwrap(1).
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import secrets
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from nanochat.config import UserError
from nanochat.sandbox import seccomp


@functools.cache
def command() -> tuple[str, ...]:
    """Return bubblewrap's command line up to the program: the namespaces, and all that is to be seen in them."""
    binary, prefix = python_binary(), sys.base_prefix
    words = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session"]
    words += [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts")]
    words += ["--hostname", "sandbox", "--uid", "65534", "--gid", "65534"]
    # For the folder, whose number of files bubblewrap does not limit; the jail gives it up before the program runs.
    words += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for system in ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"):
        words += ["--ro-bind-try", system, system]
    for system in ("/lib", "/lib64"):
        if os.path.islink(system):
            words += ["--symlink", os.readlink(system), system]
        else:
            words += ["--ro-bind-try", system, system]
    for path in (f"{prefix}/lib", f"{prefix}/lib64", binary):
        words += ["--ro-bind-try", path, path]
    for device in ("/dev/null", "/dev/urandom"):
        words += ["--dev-bind", device, device]
    words += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--clearenv"]
    for name, value in environment("/tmp").items():
        words += ["--setenv", name, value]
    return tuple(words)


def environment(folder: str) -> dict[str, str]:
    """Return all that a program finds in its environment; `folder` is its own."""
    return {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",
        "MALLOC_ARENA_MAX": "1",  # glibc would take 64 MiB of the address space for each thread
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
    }


def python_binary() -> str:
    """Return the interpreter itself, of which a virtual environment has but a link or a copy."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


MIB = 2**20
MIN_MEMORY_BYTES = 64 * MIB
"""An interpreter alone takes about 30 MiB of address space."""
FOLDER_BYTES = 32 * MIB
FOLDER_FILES = 1000
START_SECONDS = 30.0
"""For the interpreter to start; the program's own time begins after it."""
END_SECONDS = 10.0
"""For the kernel to take down what was killed."""
LOOK_SECONDS = 0.2
"""How often a silent process is looked at."""
REPORT_BYTES = 2**14
INSTALL = "apt-get install bubblewrap libseccomp2 (or your system's packages)"
NAMESPACES = (
    "Where this user may not make namespaces: docker run --security-opt seccomp=unconfined --security-opt "
    "apparmor=unconfined; on Ubuntu sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; elsewhere "
    "sysctl -w user.max_user_namespaces=10000"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended.

    Attributes:
        success: it ran to its last line, within all limits.
        stdout, stderr: what it wrote; bytes that are no UTF-8 appear as U+FFFD.
        error: None after a success; else the exception, the signal, or the limit, in a line.
        timed_out: its wall or processor time was used up.
        memory_exceeded: it ended by a MemoryError.
        seconds: wall time of the program, without the start of the interpreter.
    """

    success: bool
    stdout: str
    stderr: str
    error: str | None
    timed_out: bool
    memory_exceeded: bool
    seconds: float


def run(
    code: str,
    *,
    timeout_seconds: float = 5.0,
    memory_bytes: int = 256 * MIB,
    max_output_bytes: int = MIB,
    weak: bool = False,
) -> Result:
    """Run `code` as a program of its own and return how it ended; any number of threads may do so at once.

    Args:
        code: Python source; it sees an empty standard input.
        timeout_seconds: wall time, and processor time rounded up to whole seconds.
        memory_bytes: address space of the process; what it writes to its folder (up to 32 MiB) comes on top.
        max_output_bytes: of stdout and of stderr, each.
        weak: accept that the kernel does not isolate it.

    Raises:
        UserError: this machine cannot isolate it and `weak` is not set, a limit makes no sense, or the interpreter
            did not start. Never because of what the program does.

    Source: spec/serving.md, "Sandbox for model-written Python".
    """
    if not 0 < timeout_seconds < math.inf:
        raise UserError(f"sandbox timeout_seconds={timeout_seconds}: expected a number of seconds above 0")
    if memory_bytes < MIN_MEMORY_BYTES:
        raise UserError(f"sandbox memory_bytes={memory_bytes}: an interpreter needs {MIN_MEMORY_BYTES} at least")
    if max_output_bytes < 0:
        raise UserError(f"sandbox max_output_bytes={max_output_bytes}: expected 0 or more")
    if not weak and (reason := available()):
        raise UserError(f"{reason}; or accept weaker isolation (weak=True)")
    return _run(code, Limits(timeout_seconds, memory_bytes, max_output_bytes), weak)


@functools.cache
def available() -> str | None:
    """Return None if this machine can isolate a program, else one line: what is missing, and what mends it.

    Found out by running a program that tries the doors; once per process.
    """
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return f"the sandbox needs bubblewrap: {INSTALL}"
    try:
        result = _run(_PROBE, Limits(START_SECONDS, 256 * MIB, MIB), weak=False)
    except UserError as error:
        return str(error)
    return None if result.success else f"the sandbox does not hold on this machine: {result.error}"


_PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, door, *arguments):
    try:
        door(*arguments)
    except OSError:
        return
    raise RuntimeError(f"{name} is open")
refused("fork", os.fork)
refused("socket", socket.socket)
refused("/etc", os.listdir, "/etc")
refused("/proc", os.listdir, "/proc")
refused("/", os.mkdir, "/made")
assert libc.unshare(0x10000000) == -1, "unshare is open"
assert os.listdir("/tmp") == [], "/tmp is not its own"
open("/tmp/x", "w").close()
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use; see `run`."""

    timeout_seconds: float
    memory_bytes: int
    max_output_bytes: int


def _run(code: str, limits: Limits, weak: bool) -> Result:
    """Start the interpreter, send it the program, watch it, and leave nothing of it behind."""
    program = code.encode("utf-8", "surrogatepass")  # a lone surrogate is the interpreter's to refuse
    call_filter, secret = _filter(weak), b"s" + secrets.token_bytes(32)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder()) if weak else "/"
        sent = stack.enter_context(_sealed(call_filter + program + secret))
        report, report_end = map(stack.enter_context, _pipe())
        info, info_end = map(stack.enter_context, _pipe())
        numbers = (report_end.fileno(), len(call_filter), len(program), len(secret), limits.memory_bytes)
        numbers += (math.ceil(limits.timeout_seconds), FOLDER_BYTES, FOLDER_FILES, int(not weak))
        # Not -I: it would ignore the seed of hashes, and the same program shall print the same set twice.
        interpreter = [python_binary(), "-P", "-s", "-S", "-B", "-c", _jail(), *map(str, numbers)]
        process = subprocess.Popen(
            interpreter if weak else [*command(), "--info-fd", str(info_end.fileno()), "--", *interpreter],
            stdin=sent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(report_end.fileno(), info_end.fileno()),
            env=environment(folder) if weak else {},
            cwd=folder,
            start_new_session=True,
        )
        stack.enter_context(process)
        stack.callback(_end, process, info, weak)  # before the line above waits for it
        report_end.close()
        info_end.close()
        ending = _watch(process, report, limits)
    return _judge(ending, process.returncode, secret, limits)


@dataclasses.dataclass
class _Ending:
    """What the parent saw of a program: its output, its report, the limit that it passed if any, and its time."""

    stdout: bytearray
    stderr: bytearray
    report: bytearray
    stopped: str | None = None
    seconds: float = 0.0


def _watch(process: subprocess.Popen[bytes], report: IO[bytes], limits: Limits) -> _Ending:
    """Read what the program writes until it has ended or has passed a limit."""
    assert process.stdout and process.stderr
    ending, began = _Ending(bytearray(), bytearray(), bytearray()), time.monotonic()
    deadline, running = began + START_SECONDS, False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, (ending.stdout, limits.max_output_bytes))
        selector.register(process.stderr, selectors.EVENT_READ, (ending.stderr, limits.max_output_bytes))
        selector.register(report, selectors.EVENT_READ, (ending.report, REPORT_BYTES))
        while selector.get_map() and not ending.stopped:
            exited = process.poll() is not None  # asked first: what it wrote before it ended is then ready
            ready = selector.select(min(max(0.0, deadline - time.monotonic()), LOOK_SECONDS))
            for key, _ in ready:
                buffer, room = key.data[0], key.data[1] - len(key.data[0])
                chunk = os.read(key.fd, 2**16)
                buffer += chunk[:room]
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(chunk) > room:
                    ending.stopped = "output"
            if ending.report and not running:  # the interpreter has started: from here on it is the program's time
                running, began = True, time.monotonic()
                deadline = began + limits.timeout_seconds
            if not ending.stopped and time.monotonic() >= deadline:
                ending.stopped = "time"
            if exited and not ready:
                break  # a child that it left behind holds the pipes; happens only without a process namespace
    if not ending.stopped:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            ending.stopped = "time"
    ending.seconds = time.monotonic() - began
    return ending


def _end(process: subprocess.Popen[bytes], info: IO[bytes], weak: bool) -> None:
    """Kill what still runs of it, and return when it is gone."""
    if weak:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    elif process.poll() is None:
        # bubblewrap's death kills the first process of the namespace, whose death kills all others and waits for
        # them. It is not our child, so a descriptor is what tells when that has happened.
        with contextlib.ExitStack() as stack:
            first = _first_process(info)
            if first is not None:
                stack.callback(os.close, first)
            process.kill()
            process.wait()
            if first is not None:
                poll = select.poll()
                poll.register(first, select.POLLIN)
                poll.poll(END_SECONDS * 1000)


def _first_process(info: IO[bytes]) -> int | None:
    """Return a descriptor of the namespace's first process, or None if there is none (yet, or any more)."""
    os.set_blocking(info.fileno(), False)
    try:
        return os.pidfd_open(json.loads(info.read() or b"")["child-pid"])
    except (ValueError, ProcessLookupError):
        return None


def _judge(ending: _Ending, code: int, secret: bytes, limits: Limits) -> Result:
    """Return the result that the report, the limits and the exit code add up to.

    Raises:
        UserError: the program did not begin.
    """
    stderr = ending.stderr.decode("utf-8", "replace")
    if not ending.report.startswith(b"+"):
        said = stderr.strip().rpartition("\n")[2] or f"exit code {code} after {ending.seconds:.1f} s"
        raise UserError(f"the sandbox did not start: {said}. {NAMESPACES}")
    verdict = bytes(ending.report[1:])
    # bubblewrap exits with 128 + the number of the signal that killed the program; without it the code is negative.
    number = -code if code < 0 else code - 128
    killed_by = signal.Signals(number).name if number in set(signal.Signals) else None
    timed_out = ending.stopped == "time" or killed_by == "SIGXCPU"
    success = verdict == secret and code == 0 and ending.stopped is None  # its first byte is never e or m
    if success:
        error = None
    elif timed_out:
        error = f"timed out after {limits.timeout_seconds:g} s"
    elif ending.stopped == "output":
        error = f"wrote more than {limits.max_output_bytes} bytes"
    elif verdict[:1] in (b"e", b"m"):
        error = verdict[1:].decode("utf-8", "replace")
    elif killed_by:
        error = f"killed by {killed_by}"
    else:
        error = f"left with exit code {code} before its last line"
    return Result(
        success=success,
        stdout=ending.stdout.decode("utf-8", "replace"),
        stderr=stderr,
        error=error,
        timed_out=timed_out,
        memory_exceeded=not timed_out and verdict[:1] == b"m",
        seconds=ending.seconds,
    )


@functools.cache
def _jail() -> str:
    return Path(__file__).with_name("jail.py").read_text("utf-8")


def _filter(weak: bool) -> bytes:
    try:
        return seccomp.compile_filter(signals=not weak)
    except UserError:
        if weak:
            return b""
        raise


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return open(read, "rb", buffering=0), open(write, "wb", buffering=0)


def _sealed(content: bytes) -> IO[bytes]:
    """Return a file without a name that holds `content`, at its beginning, and that nobody can change on Linux."""
    if sys.platform != "linux":
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    else:
        descriptor = os.memfd_create("program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    if sys.platform == "linux":
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return open(descriptor, "rb", buffering=0)


def main() -> int:
    """Run the program in a file, or on standard input, and show how it ended."""
    source = Path(sys.argv[1]).read_text("utf-8") if sys.argv[1:] else sys.stdin.read()
    try:
        result = run(source)
    except UserError as error:
        sys.exit(str(error))
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    print(f"{result.error or 'success'} ({result.seconds:.2f} s)", file=sys.stderr)
    return int(not result.success)
