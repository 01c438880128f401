"""Run Python that a model wrote, isolated by the Linux kernel.

Each program gets a fresh interpreter with the standard library, behind these layers, from the outside inwards:
    bubblewrap   own user, mount, process, network, IPC and host name namespaces. The program sees the interpreter and
                 the system's libraries, read-only: no /home, /etc, /proc, network, or environment variables of ours.
    the jail     process 1 of the namespace: ends with the program, and is reaped, so that nothing is left behind.
    tmpfs        /tmp, the only writable folder, in memory, limited in bytes and files; removed with the process.
    rlimits      memory, CPU time, file size, open files, no core dump.
    seccomp      an allow-list of system calls: no other process, program or socket (`nanochat.sandbox.seccomp`).
    the parent   wall time and output; at the limit it kills the namespace with every process in it.

A program succeeds only if it runs to its last line: `sys.exit(0)` or `os._exit(0)` before it is a failure. Not
guaranteed: that a program cannot find the secret that reports success, since both run in one interpreter, or that the
kernel has no security hole.

`weak=True` does without bubblewrap: an empty environment, a temporary folder, rlimits, no capabilities, and what the
system has of seccomp and Landlock (Linux 5.13), which hides files and the environment and memory of other processes. If
they are open to the program a RuntimeWarning says so. Not for hostile programs: they can still change modes of files.

Source: the manual page bwrap(1).
"""

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal

from nanochat.config import UserError
from nanochat.sandbox import seccomp

MIB = 2**20
MIN_MEMORY_BYTES = 64 * MIB  # an interpreter alone takes about 30 MiB of address space
FOLDER_BYTES = 32 * MIB
FOLDER_FILES = 1000
SYSTEM = ("/lib", "/lib64")  # often links to those of /usr
START_SECONDS = 30.0  # for the interpreter to start, before the program's own time begins
KILL_SECONDS = 10.0  # for the kernel to remove a killed namespace
POLL_SECONDS = 0.2
REPORT_BYTES = 2**14
Process = subprocess.Popen[bytes]
INSTALL = "apt-get install bubblewrap libseccomp2 (or your system's packages)"
SECCOMP = "This kernel or container refuses seccomp filters (CONFIG_SECCOMP_FILTER): use another"
NAMESPACES = (
    "If this user may not create namespaces: docker run --security-opt seccomp=unconfined --security-opt "
    "apparmor=unconfined; on Ubuntu sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; elsewhere "
    "sysctl -w user.max_user_namespaces=10000"
)
EXPOSED = (
    "sandbox weak=True: this system has no Landlock (Linux 5.13, lsm=landlock), so programs can read the "
    "environment and memory of this user's processes and its files, with what passwords and tokens they hold"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended."""

    success: bool  # it ran to its last line within all limits
    stdout: str  # bytes that are not valid UTF-8 appear as U+FFFD
    stderr: str
    error: str | None  # None after a success, else one line: the exception, signal or limit
    timed_out: bool  # it used up its wall time or CPU time
    memory_exceeded: bool  # it ended with a MemoryError
    seconds: float  # wall time, without the start of the interpreter


@dataclasses.dataclass(frozen=True)
class Limits:
    timeout_seconds: float = 5.0
    memory_bytes: int = 256 * MIB
    max_output_bytes: int = MIB


def run(
    code: str,
    *,
    timeout_seconds: float = 5.0,
    memory_bytes: int = 256 * MIB,
    max_output_bytes: int = MIB,
    weak: bool = False,
) -> Result:
    """Run Python source as a program with an empty standard input. Thread-safe.

    Args:
        timeout_seconds: wall time; also CPU time, rounded up to whole seconds.
        memory_bytes: address space of the process; up to 32 MiB of files in its folder are extra.
        max_output_bytes: of stdout and of stderr, each.
        weak: do not require isolation by the kernel; warns if the program can read the environment of this process.
    """
    if not 0 < timeout_seconds < math.inf:
        raise UserError(f"sandbox timeout_seconds={timeout_seconds}: expected a number of seconds above 0")
    if memory_bytes < MIN_MEMORY_BYTES:
        raise UserError(f"sandbox memory_bytes={memory_bytes}: an interpreter needs at least {MIN_MEMORY_BYTES}")
    if max_output_bytes < 0:
        raise UserError(f"sandbox max_output_bytes={max_output_bytes}: expected 0 or more")
    if not weak and (reason := available()):
        raise UserError(f"{reason}; or accept weaker isolation (weak=True)")
    limits, canceled = Limits(timeout_seconds, memory_bytes, max_output_bytes), threading.Event()
    # In a thread of its own no KeyboardInterrupt comes between the start of a process and the care for it.
    with ThreadPoolExecutor(1, "sandbox") as pool:
        try:
            return pool.submit(_run, code, limits, weak, canceled).result()
        except BaseException:
            canceled.set()
            raise


@functools.cache
def available() -> str | None:
    """Return None if a program that tries to break out cannot, else one line: what is missing, and how to fix it."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return f"the sandbox needs bubblewrap: {INSTALL}"
    try:
        result = _run(_PROBE, Limits(timeout_seconds=START_SECONDS), False, threading.Event())
    except UserError as error:
        return str(error)
    return None if result.success else f"the sandbox does not isolate on this machine: {result.error}"


_PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def require_refused(name, function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return
    raise RuntimeError(f"{name} is allowed")
require_refused("fork", os.fork)
require_refused("socket", socket.socket)
require_refused("reading /etc", os.listdir, "/etc")
require_refused("reading /proc", os.listdir, "/proc")
require_refused("writing to /", os.mkdir, "/made")
assert libc.unshare(0x10000000) == -1, "unshare is allowed"
assert os.listdir("/tmp") == [], "/tmp is not private"
open("/tmp/x", "w").close()
"""


def _run(code: str, limits: Limits, weak: bool, canceled: threading.Event) -> Result:
    """Run a program, and leave no process, file or descriptor behind."""
    program = code.encode("utf-8", "surrogatepass")  # a lone surrogate is for the interpreter to refuse
    call_filter, secret = _filter(weak), b"s" + secrets.token_bytes(32)
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) if weak else None
        folder = stack.enter_context(temporary) if temporary else "/"
        stdin = stack.enter_context(_sealed_file(call_filter + program + secret))
        report, report_end = map(stack.enter_context, _pipe())
        stop_end, stop = map(stack.enter_context, _pipe())
        numbers = (report_end.fileno(), stop_end.fileno(), len(call_filter), len(program), len(secret))
        numbers += (limits.memory_bytes, math.ceil(limits.timeout_seconds), FOLDER_BYTES, FOLDER_FILES, int(not weak))
        # Not -I: it ignores PYTHONHASHSEED, and a program should print the same set in every run.
        interpreter = [python_binary(), "-P", "-s", "-S", "-B", "-c", _jail(), *map(str, numbers)]
        if weak:
            interpreter += [*SYSTEM, *readable_paths(), "/dev/urandom", "/etc/mime.types"]  # that `mimetypes` reads
        process = subprocess.Popen(
            interpreter if weak else [*command(), "--", *interpreter],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(report_end.fileno(), stop_end.fileno()),
            env=environment(folder) if weak else {},
            cwd=folder,
            start_new_session=True,
        )
        stack.enter_context(process)
        stack.callback(_terminate, process, stop)  # runs before the line above waits for the process
        report_end.close()
        stop_end.close()
        outcome = _monitor(process, report, limits, canceled)
    return _result(outcome, process.returncode, secret, limits)


@dataclasses.dataclass
class _Outcome:
    """What the parent saw of a program."""

    stdout: bytearray = dataclasses.field(default_factory=bytearray)
    stderr: bytearray = dataclasses.field(default_factory=bytearray)
    report: bytearray = dataclasses.field(default_factory=bytearray)
    exceeded: Literal["time", "output", "canceled"] | None = None
    seconds: float = 0.0


def _monitor(process: Process, report: IO[bytes], limits: Limits, canceled: threading.Event) -> _Outcome:
    """Read the program's output until it exits or exceeds a limit."""
    assert process.stdout and process.stderr
    outcome, started, running = _Outcome(), time.monotonic(), False
    deadline = started + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, (outcome.stdout, limits.max_output_bytes))
        selector.register(process.stderr, selectors.EVENT_READ, (outcome.stderr, limits.max_output_bytes))
        selector.register(report, selectors.EVENT_READ, (outcome.report, REPORT_BYTES))
        while selector.get_map() and not outcome.exceeded:
            exited = process.poll() is not None  # before select, so that what it wrote before its exit is ready
            ready = selector.select(min(max(0.0, deadline - time.monotonic()), POLL_SECONDS))
            for key, _ in ready:
                buffer, room = key.data[0], key.data[1] - len(key.data[0])
                chunk = os.read(key.fd, 2**16)
                buffer += chunk[:room]
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(chunk) > room:
                    outcome.exceeded = "output"
            if outcome.report and not running:  # the interpreter has started: the program's own time begins
                running, started = True, time.monotonic()
                deadline = started + limits.timeout_seconds
            if not outcome.exceeded and time.monotonic() >= deadline:
                outcome.exceeded = "time"
            if canceled.is_set():
                outcome.exceeded = "canceled"
            if exited and not ready:
                break  # a child still holds the pipes, which can only happen without a process namespace
    if not outcome.exceeded:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            outcome.exceeded = "time"
    outcome.seconds = time.monotonic() - started
    return outcome


def _terminate(process: Process, stop: IO[bytes]) -> None:
    """Have the jail kill what still runs of the program, and wait until it is gone."""
    with contextlib.suppress(BrokenPipeError):
        stop.write(b"x")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
    if process.returncode is None or process.returncode < 0:  # the jail does not answer, or was killed itself
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _result(outcome: _Outcome, code: int, secret: bytes, limits: Limits) -> Result:
    stdout, stderr = (text.decode("utf-8", "replace") for text in (outcome.stdout, outcome.stderr))
    if not outcome.report.startswith((b"+", b"!")):
        message = stderr.strip().rpartition("\n")[2] or f"exit code {code} after {outcome.seconds:.1f} s"
        raise UserError(f"the sandbox did not start: {message}. {SECCOMP if 'seccomp' in message else NAMESPACES}")
    if outcome.report.startswith(b"!"):
        warnings.warn(EXPOSED, RuntimeWarning, stacklevel=1)
    report = outcome.report[1:]  # the secret, or e or m and the error
    # bubblewrap exits with 128 + the number of the signal that killed the program; without it the code is negative.
    number = -code if code < 0 else code - 128
    killed_by = signal.Signals(number).name if number in set(signal.Signals) else None
    timed_out = outcome.exceeded == "time" or killed_by == "SIGXCPU"
    error = None
    if timed_out:
        error = f"timed out after {limits.timeout_seconds:g} s"
    elif outcome.exceeded == "output":
        error = f"wrote more than {limits.max_output_bytes} bytes"
    elif report[:1] in (b"e", b"m"):
        error = report[1:].decode("utf-8", "replace")
    elif killed_by:
        error = f"killed by {killed_by}"
    elif report != secret or code != 0:
        error = f"exited with code {code} before its last line"
    memory_exceeded = not timed_out and report[:1] == b"m"
    return Result(error is None, stdout, stderr, error, timed_out, memory_exceeded, outcome.seconds)


@functools.cache
def command() -> tuple[str, ...]:
    """Return bubblewrap's command line up to the program."""
    # As process 1 the jail is a child of bubblewrap, which reaps it: bubblewrap's own process 1 would stay a zombie
    # until the system's process 1 reaps it, and in most containers that never does.
    words = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--as-pid-1"]
    words += [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts")]
    words += ["--hostname", "sandbox", "--uid", "65534", "--gid", "65534"]
    # To mount /tmp, since bubblewrap cannot limit the number of files; the jail drops it before the program runs.
    words += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for system in SYSTEM:
        if os.path.islink(system):
            words += ["--symlink", os.readlink(system), system]
        else:
            words += ["--ro-bind-try", system, system]
    for path in readable_paths():
        words += ["--ro-bind-try", path, path]
    for device in ("/dev/null", "/dev/urandom"):
        words += ["--dev-bind", device, device]
    words += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--clearenv"]
    for name, value in environment("/tmp").items():
        words += ["--setenv", name, value]
    return tuple(words)


def readable_paths() -> list[str]:
    """Return what a program may read besides its own folder and `SYSTEM`."""
    prefix = sys.base_prefix
    return ["/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", f"{prefix}/lib", f"{prefix}/lib64", python_binary()]


def environment(folder: str) -> dict[str, str]:
    """Return the environment of a program; `folder` is its home."""
    return {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",
        "MALLOC_ARENA_MAX": "1",  # glibc would take 64 MiB of address space per thread
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
    }


def python_binary() -> str:
    """Return the interpreter itself, of which a virtual environment has only a link or a copy."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def _jail() -> str:
    return Path(__file__).with_name("jail.py").read_text("utf-8")


def _filter(weak: bool) -> bytes:
    try:
        return seccomp.compile_filter(allow_signals=not weak)
    except UserError:
        if weak:
            return b""
        raise


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return open(read, "rb", buffering=0), open(write, "wb", buffering=0)


def _sealed_file(content: bytes) -> IO[bytes]:
    """Return an unnamed file with this content; immutable on Linux."""
    if sys.platform != "linux":
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (the caller closes it)
        file.write(content)
        file.seek(0)
        return file
    descriptor = os.memfd_create("program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as writer:
        writer.write(content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return open(descriptor, "rb", buffering=0)
