"""What a sandboxed program is started with: bubblewrap's command line, the environment, and the interpreter.

Source: the manual page bwrap(1).
"""

import functools
import os
import shutil
import sys


@functools.cache
def command() -> tuple[str, ...]:
    """Return bubblewrap's command line up to the program: the namespaces, and all that is to be seen in them."""
    binary, prefix = interpreter(), sys.base_prefix
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


def interpreter() -> str:
    """Return the interpreter itself, of which a virtual environment has but a link or a copy."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
