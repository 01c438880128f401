"""The sandbox: what a program may do, what is refused, how it is reported, and that it leaves nothing behind."""

import contextlib
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_runs import (
    ATTEMPT,
    adopt_orphans,
    assert_unavailable,
    clear_caches,
    need_libseccomp,
    run,
    wait_for_processes,
)

import nanochat
from nanochat.config import UserError
from nanochat.sandbox import Result, seccomp
from nanochat.sandbox import bubblewrap as sandbox

ROOT = Path(__file__).parents[2]
MIB = sandbox.MIB


def run_attempts(code: str) -> Result:
    """Run code that calls `attempt`; every attempt has to be refused, and the program to complete."""
    result = run(ATTEMPT + textwrap.dedent(code))
    assert result.success, result
    assert "refused:" in result.stdout and "ALLOWED" not in result.stdout, result.stdout
    return result


def test_output_of_a_successful_program(kernel: str) -> None:
    result = run("import sys\nprint('häl', 'lo')\nprint('warn', file=sys.stderr)\nprint(sys.stdin.read() == '')")
    assert 0 < result.seconds < 30
    assert result == Result(True, "häl lo\nTrue\n", "warn\n", None, False, False, result.seconds)
    assert len({run("print({'a', 'b', 'c', 'd', 'e', 'f'})").stdout for _ in range(4)}) == 1, "a fixed hash seed"


def test_error_shows_the_traceback_of_the_program(kernel: str) -> None:
    result = run("def f(x):\n    return 1 / x\nf(0)")
    assert not result.success and result.error == "ZeroDivisionError: division by zero"
    assert result.stderr.startswith('Traceback (most recent call last):\n  File "program.py", line 3, in <module>')
    assert "return 1 / x" in result.stderr and "jail" not in result.stderr


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("x = (", r"SyntaxError: '\(' was never closed"),
        ("\0", "SyntaxError: source code string cannot contain null bytes|ValueError"),
        ("'\ud800'", "SyntaxError: .*utf-8"),
        ("def f(): f()\nf()", "RecursionError"),
        ("class E(Exception):\n    def __str__(self): raise KeyError\nraise E", "E: <unprintable: KeyError>"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
        ("import os\nos.abort()", "killed by SIGABRT"),
        ("import os\nos.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 .*before its last line"),
        ("raise SystemExit", "SystemExit .*before its last line"),
        ("import os\nos._exit(0)", "exited with code 0 before its last line"),
        ("import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: 1", "code 0 before"),
        ("import atexit, os\natexit.register(os._exit, 0)", "exited with code 0"),
        ("import os\nos.closerange(0, 256)", "exited with code"),
        ("import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'=' * 9999)\n  except OSError: pass\n1 / 0", ".+"),
    ],
)
def test_program_that_does_not_complete_its_last_line_fails(kernel: str, code: str, error: str) -> None:
    result = run(code)
    assert not result.success
    assert result.error is not None
    assert re.search(error, result.error), result.error


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\nasync def f(): await asyncio.sleep(0.001)\nasyncio.run(f())",
        "from concurrent.futures import ThreadPoolExecutor as T\nimport threading\nb = threading.Barrier(16)\n"
        "assert len(list(T(16).map(lambda x: b.wait(), range(16)))) == 16",
        "import threading\nthreading.Thread(target=print, args=('later',)).start()",
        "import os, builtins, sys\nos.write = os.read = os.pread = os._exit = sys.exit = builtins.print = None",
        "import dataclasses, pickle\n"
        "@dataclasses.dataclass\nclass A: x: int\nassert pickle.loads(pickle.dumps(A(1))) == A(1)",
        "if __name__ == '__main__':\n    import sys\n    assert sys.argv == ['program.py']\nelse:\n    1 / 0",
        "import os, shutil\nopen('a', 'w').write('x')\nshutil.copytree('.', 'b')\nassert os.getcwd() == '/tmp'",
        "import tempfile\nwith tempfile.TemporaryDirectory() as d, tempfile.TemporaryFile() as f: f.write(b'x')",
        "import sqlite3\nc = sqlite3.connect('x.db')\nc.execute('create table t (x)')\nc.commit()\nc.close()",
        "import ctypes, decimal, hashlib, json, random, ssl, statistics, zoneinfo, os\n"
        "assert os.cpu_count() and random.random()",
        "import faulthandler, mmap, select, signal, time\n"
        "signal.setitimer(signal.ITIMER_REAL, 9)\ntime.sleep(0.001)\nmmap.mmap(-1, 9)",
    ],
)
def test_ordinary_programs_work(kernel: str, code: str) -> None:
    result = run(code)
    assert result.success, result


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import os, time\nos.closerange(0, 256)\ntime.sleep(1000)",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import threading\nthreading.Thread(target=threading.Event().wait).start()",
        "9 ** 9 ** 9",
    ],
)
def test_endless_programs_time_out(kernel: str, code: str) -> None:
    result = run(code, timeout_seconds=0.4)
    assert not result.success and result.timed_out and not result.memory_exceeded
    assert result.error == "timed out after 0.4 s"
    assert 0.4 <= result.seconds < 30


def test_cpu_time_is_limited(kernel: str) -> None:
    code = """
        import resource
        print(resource.getrlimit(resource.RLIMIT_CPU), flush=True)
        resource.setrlimit(resource.RLIMIT_CPU, (1, 3))
        while True: pass
    """
    result = run(code, timeout_seconds=59.9)
    assert result.timed_out and result.stdout == "(60, 61)\n" and result.seconds < 59.8


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    ],
)
def test_fork_and_thread_bombs_fail(kernel: str, code: str) -> None:
    result = run(code, timeout_seconds=0.5)
    assert not result.success
    assert "can't start new thread" in str(result.error) or result.timed_out


@pytest.mark.parametrize(
    "code",
    [
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "x = bytearray(10**12)",
        "x = 'a' * 10**9",
        "x = []\nwhile True: x.append(x[-1:] * 9 + [len(x)] * 99)",
        "x = {}\nwhile True: x[str(len(x))] = len(x)",
    ],
)
def test_memory_bombs_are_reported_as_such(kernel: str, code: str) -> None:
    result = run(code, timeout_seconds=100)
    assert not result.success and result.memory_exceeded and not result.timed_out
    assert str(result.error).startswith("MemoryError")


def test_files_maps_and_pipes_cannot_exceed_the_memory_limit(kernel: str) -> None:
    result = run("""
        import mmap, os
        def fill(allocate):
            done = 0
            try:
                while True: done += allocate(done)
            except (OSError, MemoryError) as error:
                print(done, type(error).__name__)
        def write(done):
            with open(f"{done}", "wb") as file: return file.write(bytes(2**20))
        fill(write)
        for name in os.listdir(): os.remove(name)
        fill(lambda done: not open(f"{done}", "w").close())
        kept = []
        fill(lambda done: not kept.append(mmap.mmap(-1, 2**20)))
        del kept
        fill(lambda done: os.memfd_create("x"))
        fill(lambda done: not os.pipe() == 0)
    """)
    assert result.success, result
    folder, files, maps, shared, pipes = (line.split() for line in result.stdout.splitlines())
    assert 16 * MIB < int(folder[0]) <= sandbox.FOLDER_BYTES
    assert 500 < int(files[0]) <= sandbox.FOLDER_FILES
    assert 100 < int(maps[0]) <= 256
    assert shared == ["0", "PermissionError"]
    assert int(pipes[0]) <= 32
    assert run("open('x', 'wb').truncate(2**40)").error == "OSError: [Errno 27] File too large"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_limited_without_buffering_it(kernel: str, stream: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run(f"import sys\nfor _ in range(1000): sys.{stream}.write('x' * 10**6)", max_output_bytes=100_000)
    assert not result.success and result.error == "wrote more than 100000 bytes"
    assert getattr(result, stream) == "x" * 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    exact = run(f"import sys\nsys.{stream}.write('x' * 100_000)", max_output_bytes=100_000)
    assert exact.success and len(getattr(exact, stream)) == 100_000


def test_only_the_private_tmp_is_writable(kernel: str, tmp_path: Path) -> None:
    package = Path(str(nanochat.__file__)).parent
    name = f"written-{uuid.uuid4()}"
    folders = [Path.home(), package, ROOT, tmp_path, Path(sys.base_prefix) / "lib"]
    folders += [Path(folder) for folder in ("/", "/usr/lib", "/dev", "/etc", "/dev/shm", "/var/tmp", "/tmp")]
    result = run(f"""
        import os
        for folder in {list(map(str, folders))}:
            try:
                open(folder + "/{name}", "w").write("x")
            except OSError:
                continue
            print(folder)
        print(os.listdir())
    """)
    assert result.success and result.stdout == f"/tmp\n['{name}']\n", result  # its own /tmp
    assert [folder for folder in folders if (folder / name).exists()] == []
    run_attempts(f"""
        attempt(os.remove, {sandbox.__file__!r})
        attempt(os.remove, os.__file__)
        attempt(os.chmod, os.__file__, 0)
        attempt(os.truncate, os.__file__, 0)
    """)


def test_files_and_environment_of_the_host_are_hidden(
    kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("API_SECRET", "in-the-environment")
    (tmp_path / "secret").write_text("in-a-file")
    paths = ["/etc/passwd", "/etc/hostname", "/proc/1/environ", "/proc/self/environ", str(tmp_path / "secret")]
    paths += [f"/proc/{os.getpid()}/environ", str(Path.home() / ".bashrc"), str(sandbox.__file__)]
    result = run_attempts(f"""
        for path in {paths}:
            attempt(open, path)
        for path in ("/etc", "/proc", "/sys", "/home", "/var", "/dev/shm", {str(ROOT)!r}):
            attempt(os.listdir, path)
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_char_p
        print(sorted(os.environ), getenv(b"API_SECRET"), os.uname().nodename, os.getuid(), os.getppid())
    """)
    assert "in-the-environment" not in result.stdout and "in-a-file" not in result.stdout
    names = sorted([*sandbox.environment("/tmp"), "PWD"])
    assert result.stdout.endswith(f"{names} None sandbox 65534 1\n")


@contextlib.contextmanager
def unreachable_server() -> Iterator[tuple[str, int]]:
    """Give the address of a server, and check that nobody connected to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


def test_network_is_unreachable(kernel: str) -> None:
    with unreachable_server() as address:
        run_attempts(f"""
            import socket, urllib.request
            attempt(socket.create_connection, {address}, 1)
            attempt(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
            attempt(socket.socket, socket.AF_UNIX)
            attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)
            attempt(socket.socketpair, socket.AF_INET)
            attempt(socket.create_server, ("127.0.0.1", 0))
            attempt(socket.gethostbyname, "localhost")
        """)


def test_system_calls_through_ctypes_are_refused(kernel: str) -> None:
    result = run(f"""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def call(function, *arguments, name=None):
            ctypes.set_errno(0)
            code = getattr(libc, function)(*arguments)
            outcome = "refused" if code == -1 else "ALLOWED"
            print(outcome, name or function, code, os.strerror(ctypes.get_errno()))
        zero = ctypes.c_long(0)
        for function, *arguments in [
            ("fork",), ("vfork",), ("execv", b"/bin/sh", None), ("kill", {os.getpid()}, 9),
            ("kill", {os.getpid()}, 0),
            ("socket", 2, 1, 0), ("socketpair", 2, 1, 0, (ctypes.c_int * 2)()), ("unshare", 0x10000000),
            ("unshare", 0x20000), ("setns", 0, 0), ("mount", b"tmpfs", b"/tmp", b"tmpfs", zero, None),
            ("umount2", b"/tmp", 2), ("chroot", b"/tmp"), ("ptrace", 16, 1, zero, zero),
            ("process_vm_readv", 1, None, zero, None, zero, zero), ("memfd_create", b"x", 0),
            ("shmget", 0, 4096, 0o1600), ("semget", 0, 1, 0o1600), ("msgget", 0, 0o1600), ("inotify_init1", 0),
            ("personality", zero), ("prctl", 4, zero, zero, zero, zero), ("prctl", 22, zero, None),
            ("prlimit", 1, 7, None, None), ("ioctl", 0, 0x5412, b"x"), ("setuid", 0), ("sethostname", b"x", 1),
            ("reboot", 0), ("swapon", b"x", 0),
        ]:
            call(function, *arguments)
        print("refused" if libc.system(b"true") in (-1, 127 << 8) else "ALLOWED", "system")
        for name, number in dict(
            clone3=435, io_uring_setup=425, pidfd_open=434, bpf=321, keyctl=250, perf_event_open=298,
            userfaultfd=323, add_key=248, kexec_load=246, memfd_secret=447, pidfd_getfd=438, open_by_handle_at=304,
            fsopen=430, mount_setattr=442, landlock=444, clone=56,
        ).items():
            if os.uname().machine == "x86_64":
                call("syscall", ctypes.c_long(number), ctypes.c_long(17), zero, zero, zero, zero, name=name)
    """)
    assert result.success, result
    lines = result.stdout.splitlines()
    assert len(lines) >= 30 and [line for line in lines if not line.startswith("refused")] == []


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has further tables of system calls")
def test_x32_system_calls_kill_the_program(kernel: str) -> None:
    result = run("import ctypes\nctypes.CDLL(None).syscall(ctypes.c_long(2**30 + 39))")  # x32's getpid
    assert result.error == "killed by SIGSYS"


GRANDCHILDREN = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
"""


@pytest.mark.parametrize("end", ["print('end')", "while True: pass"])
def test_namespaces_isolate_without_the_filter(kernel: str, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(sandbox, "_filter", lambda weak: b"")
    monkeypatch.setattr(sandbox, "_jail", lambda jail=sandbox._jail: jail().replace('"RLIMIT_NPROC"', '"RLIMIT_CORE"'))
    with unreachable_server() as address:
        code = f"""
import os, socket
try: socket.create_connection({address}, 1)
except OSError as error: print(error.strerror)
for pid in ({os.getpid()}, {os.getppid()}):
    try: os.kill(pid, 9)
    except OSError as error: print(error.strerror)
{GRANDCHILDREN}
print("made", flush=True)
{end}
"""
        result = run(code, timeout_seconds=2 if "while" in end else 60)
    assert result.success == ("end" in end), result
    expected = ["Connection refused", "No such process", "No such process", "made", *(["end"] if "end" in end else [])]
    assert result.stdout.splitlines() == expected


def test_killing_the_parent_kills_the_program(kernel: str) -> None:
    code = "import time\nprint(1, flush=True)\ntime.sleep(1000)"
    program = "from nanochat.sandbox import bubblewrap as sandbox\njail = sandbox._jail()\n"
    program += f"sandbox._jail = lambda: jail + {kernel!r}\n"
    program += f"print('ready', flush=True)\nsandbox.run({code!r}, timeout_seconds=100)"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout
    adopt_orphans(False)
    parent.stdout.readline()
    wait_for_processes(kernel, 4, 100)  # the parent, bubblewrap, the jail, the program
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for_processes(kernel, 0, 100)


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.02, 0.05, 0.2])
def test_keyboard_interrupt_ends_a_run_and_leaves_nothing(
    mark: str, request: pytest.FixtureRequest, weak: bool, seconds: float
) -> None:
    if not weak:
        request.getfixturevalue("kernel")
    main = threading.get_ident()
    timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        run("import time\ntime.sleep(1000)", timeout_seconds=100, weak=weak)


def test_concurrent_runs(kernel: str) -> None:
    codes = ["print({n})", "1 / 0", "while True: pass", "x = 'a' * 10**9", "while True: print('x' * 10**5)"]
    with ThreadPoolExecutor(8) as pool:
        limits = [1.5 if "while True: pass" in code else 60 for code in codes]
        results = pool.map(lambda n: run(codes[n % 5].format(n=n), timeout_seconds=limits[n % 5]), range(24))
        for n, result in enumerate(results):
            kind = n % len(codes)
            assert result.success == (kind == 0) and (kind != 0 or result.stdout == f"{n}\n"), (n, result)
            assert result.timed_out == (kind == 2) and result.memory_exceeded == (kind == 3), (n, result)


def test_limits_are_arguments(kernel: str) -> None:
    code = "x = bytearray(150 * 2**20)"
    assert run(code).success
    assert run(code, memory_bytes=128 * MIB).memory_exceeded
    assert run("pass", memory_bytes=sandbox.MIN_MEMORY_BYTES).success
    out_of_range = {"timeout_seconds": (0, math.nan), "memory_bytes": (1,), "max_output_bytes": (-1,)}
    for name, values in out_of_range.items():
        for value in values:
            with pytest.raises(UserError, match=name):
                run("pass", **{name: value})
    assert run("x = 1\n" * 10**5).success  # a program of 600 kB


HUMANEVAL = json.loads((ROOT / "tests/data/humaneval.json").read_text())


@pytest.mark.parametrize("task", HUMANEVAL, ids=lambda task: task["entry_point"])
def test_humaneval_solutions(kernel: str, task: dict[str, str]) -> None:
    check = f"{task['test']}\ncheck({task['entry_point']})"
    result = run(f"{task['prompt']}{task['canonical_solution']}\n{check}")
    assert result.success, result
    wrong = run(f"{task['prompt']}    return None\n{check}")
    assert not wrong.success and str(wrong.error).startswith(("AssertionError", "TypeError")), wrong


def test_missing_programs_are_reported(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    clear_caches(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert_unavailable("apt-get install bubblewrap")
    clear_caches(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false")
    monkeypatch.setattr(seccomp, "LIBRARY", "libseccomp-none.so")
    assert_unavailable("apt-get install libseccomp2")


def test_forbidden_namespaces_are_reported(monkeypatch: pytest.MonkeyPatch, mark: str, tmp_path: Path) -> None:
    clear_caches(monkeypatch)
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(fake))
    need_libseccomp()
    assert_unavailable("No permissions to create new namespace")
    assert "apparmor" in str(sandbox.available())


def test_probe_detects_missing_isolation(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_caches(monkeypatch)
    monkeypatch.setattr(sandbox, "_filter", lambda weak: b"")
    assert "is allowed" in str(sandbox.available())


def test_command_line(kernel: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("print('from a file')")
    command = [sys.executable, "-m", "nanochat.sandbox"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "from a file\n") and done.stderr.startswith("success")
    done = subprocess.run(command, input="1 / 0", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "ZeroDivisionError: division by zero (" in done.stderr


def test_import_needs_no_torch() -> None:
    code = "import sys\nfrom nanochat import sandbox\nsandbox.run\n"
    code += "assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
