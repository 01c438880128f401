"""Without namespaces, Landlock, seccomp or libseccomp: what is still refused, and what is said."""

import ctypes
import os
import time
import warnings
from pathlib import Path

import pytest
from sandbox_runs import ATTEMPT, assert_unavailable, break_jail, clear_caches, need_libseccomp, run

from nanochat.sandbox import bubblewrap as sandbox

MIB = sandbox.MIB
LANDLOCK_CREATE_RULESET = 444


def test_weak_mode(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_SECRET", "in-the-environment")
    result = run("import os\nopen('x', 'w').write('y')\nprint(os.listdir(), os.getcwd())\nprint(os.environ)", weak=True)
    assert result.success and result.stdout.startswith("['x']") and "API_SECRET" not in result.stdout
    assert not os.path.exists(result.stdout.split()[1])
    assert run("while True: pass", weak=True, timeout_seconds=0.3).timed_out
    assert run("x = 'a' * 10**9", weak=True).memory_exceeded
    assert run("while True: print('x' * 10**5)", weak=True).error == f"wrote more than {MIB} bytes"
    assert run("import os\nos._exit(0)", weak=True).error == "exited with code 0 before its last line"
    assert run("import os\nos.abort()", weak=True).error == "killed by SIGABRT"


def test_weak_mode_uses_the_filter(mark: str) -> None:
    need_libseccomp()
    kill = f"os.kill({os.getpid()}, 9)"
    for code in ("os.fork()", kill, "__import__('socket').socket()", "os.execv('/bin/true', ['x'])"):
        assert str(run(f"import os\n{code}", weak=True).error).startswith("PermissionError"), code


@pytest.mark.parametrize("end", ["print('end')", "while True: pass", "os._exit(0)"])
def test_weak_mode_kills_its_process_group(mark: str, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(sandbox, "_filter", lambda weak: b"")
    monkeypatch.setattr(sandbox, "_jail", lambda jail=sandbox._jail: jail().replace('"RLIMIT_NPROC"', '"RLIMIT_CORE"'))
    started = time.monotonic()
    code = f"import os, time\nif os.fork() == 0: time.sleep(1000)\n{end}"
    result = run(code, weak=True, timeout_seconds=0.7 if "while" in end else 60)
    assert result.success == ("end" in end)
    assert time.monotonic() - started < 100


def test_weak_mode_kills_what_left_its_process_group(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("RLIMIT_NPROC keeps an ordinary user from it")
    monkeypatch.setattr(sandbox, "_filter", lambda weak: b"")
    code = "import os\nfor _ in range(5):\n  if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    while True: pass"
    result = run(code, weak=True)
    assert result.success, result


READ_PARENT = f"""
import ctypes, os
{ATTEMPT}
class Block(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]
libc, buffer = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(8)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
for pid in (os.getppid(), {{parent}}, {{grandparent}}):
    for name in ("environ", "mem", "maps", "auxv"):
        attempt(open, f"/proc/{{{{pid}}}}/{{{{name}}}}", "rb")
    for name in ("exe", "cwd", "root"):
        attempt(os.readlink, f"/proc/{{{{pid}}}}/{{{{name}}}}")
    block = ctypes.byref(Block(ctypes.addressof(buffer), 8))
    attempt(call, "process_vm_readv", pid, block, 1, ctypes.byref(Block({{address}}, 8)), 1, 0)
"""
READ_FILES = """
for path in {paths}:
    attempt(open, path)
attempt(os.listdir, "/tmp")
attempt(open, os.__file__, "a")
"""


@pytest.mark.parametrize("seccomp_filter", [True, False])
@pytest.mark.parametrize("landlock", [True, False])
def test_weak_mode_hides_the_parent(
    mark: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seccomp_filter: bool, landlock: bool
) -> None:
    if landlock and ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1) < 1:
        pytest.skip("this kernel has no Landlock")
    if not seccomp_filter:
        break_jail(monkeypatch, "set_seccomp, filter_mode = 22", "set_seccomp, filter_mode = 999")
    if not landlock:
        break_jail(monkeypatch, f"= {LANDLOCK_CREATE_RULESET},", "= 9999,")
    secret = tmp_path / "secret"
    secret.write_text("in-a-file")
    text = b"in-the-memory"
    code = READ_PARENT.format(parent=os.getpid(), grandparent=os.getppid(), address=id(text))
    if landlock:
        code += READ_FILES.format(paths=["/etc/passwd", "/proc/self/status", str(secret), sandbox.__file__])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(code, weak=True)
    assert result.success, result
    assert "refused:" in result.stdout
    if caught:  # as an ordinary user without Landlock
        assert not landlock and os.getuid() != 0 and "no Landlock" in str(caught[0].message)
    else:
        assert "ALLOWED" not in result.stdout, result.stdout


def test_kernel_without_seccomp_is_told_from_one_without_namespaces(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_caches(monkeypatch)
    break_jail(monkeypatch, "set_seccomp, filter_mode = 22", "set_seccomp, filter_mode = 999")
    assert_unavailable("refuses seccomp filters")
    assert "namespace" not in str(sandbox.available()) and "apparmor" not in str(sandbox.available())
    result = run("import os\nos.fork()", weak=True)
    assert os.getuid() == 0 or str(result.error).startswith("BlockingIOError")
