"""Inside the sandbox: drop privileges, then run the program.

Never imported: `bubblewrap` passes this text to a fresh interpreter, so it needs the standard library only. Descriptor
0 holds the system call filter, the program, and a secret that is sent back after the program's last line. The first
byte sent to the report descriptor says that the program starts.
"""

import atexit
import contextlib
import ctypes
import os
import resource
import sys
import types
from collections.abc import Callable

FILE_NAME = "program.py"
RESERVE_BYTES = 16 * 2**20  # memory withheld from the program, so that a MemoryError can be reported
SPARE_BYTES = 4 * 2**20  # memory freed first, because raising the limit takes a little memory itself


class FilterProgram(ctypes.Structure):
    # The kernel's struct sock_fprog
    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def check(code: int, what: str) -> None:
    if code != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount_folder(libc: ctypes.CDLL, folder_bytes: int, folder_files: int) -> None:
    """Mount an empty, limited /tmp in memory, then drop the capability to mount."""
    options = f"size={folder_bytes},nr_inodes={folder_files},mode=700".encode()
    nosuid_nodev_noexec = 2 | 4 | 8
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(nosuid_nodev_noexec), options), "mount /tmp")
    os.chdir("/tmp")
    version_3, this_process = 0x20080522, 0
    no_capabilities = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; two words each
    check(libc.capset((ctypes.c_uint32 * 2)(version_3, this_process), no_capabilities), "capset")


def set_limits(memory_bytes: int, cpu_seconds: int, folder_bytes: int, *, enforced: bool, filtered: bool) -> None:
    """Set the rlimits; unless `enforced`, skip those that the system does not have."""
    limits = {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1),
        "RLIMIT_FSIZE": (folder_bytes, folder_bytes),
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_AS": (memory_bytes - RESERVE_BYTES, memory_bytes),
    }
    if not filtered:
        limits["RLIMIT_NPROC"] = (0, 0)  # has no effect on root
    for name, values in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), values)
        except (AttributeError, OSError, ValueError):
            if enforced:
                raise


def install_filter(libc: ctypes.CDLL, instructions: bytes) -> None:
    set_no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    zero = ctypes.c_ulong(0)
    check(libc.prctl(set_no_new_privileges, ctypes.c_ulong(1), zero, zero, zero), "no_new_privs")
    program = FilterProgram(len(instructions) // 8, instructions)
    check(libc.prctl(set_seccomp, ctypes.c_ulong(filter_mode), ctypes.byref(program)), "seccomp")


def describe(error: BaseException) -> bytes:
    """Return the last line of the traceback, short enough for one write to a pipe."""
    try:
        text = str(error)
    except BaseException as second:  # the program's own __str__ may do anything
        text = f"<unprintable: {type(second).__name__}>"
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SystemExit):
        line += " (exited before its last line)"
    return line[:2000].encode("utf-8", "replace")


def print_traceback(error: BaseException, source: bytes) -> None:
    """Print the traceback with the program's lines and without this file's."""
    import linecache
    import traceback

    lines = source.decode("utf-8", "replace").splitlines(True)
    linecache.cache[FILE_NAME] = (len(source), None, lines, FILE_NAME)
    traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)


def run(source: bytes, report: int, send_secret: Callable[[], object]) -> None:
    """Run the program as `__main__`; at interpreter exit call `send_secret` if it reached its last line."""
    write, exit_process, set_limit = os.write, os._exit, resource.setrlimit  # the program may replace them
    main = types.ModuleType("__main__")
    main.__file__ = FILE_NAME
    sys.modules["__main__"] = main
    sys.argv[:] = [FILE_NAME]
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    completed, full_memory, spare = [], (hard, hard), bytes(SPARE_BYTES)
    atexit.register(lambda: completed and send_secret())  # registered first, so called last
    try:
        exec(compile(source, FILE_NAME, "exec"), main.__dict__)
        completed.append(True)
    except BaseException as error:
        del spare
        with contextlib.suppress(OSError, ValueError):
            set_limit(resource.RLIMIT_AS, full_memory)
        write(report, (b"m" if isinstance(error, MemoryError) else b"e") + describe(error))
        with contextlib.suppress(BaseException):  # already reported; only the exit is left
            if not isinstance(error, SystemExit):
                print_traceback(error, source)
            sys.stdout.flush()
            sys.stderr.flush()
        exit_process(1)


def main() -> None:
    report, filter_bytes, program_bytes, secret_bytes = map(int, sys.argv[1:5])
    memory_bytes, cpu_seconds, folder_bytes, folder_files, enforced = map(int, sys.argv[5:])
    received = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    libc = ctypes.CDLL(None, use_errno=True)
    if enforced:
        mount_folder(libc, folder_bytes, folder_files)
    set_limits(memory_bytes, cpu_seconds, folder_bytes, enforced=bool(enforced), filtered=filter_bytes > 0)
    if filter_bytes:
        install_filter(libc, os.pread(received, filter_bytes, 0))
    read, write = os.pread, os.write
    write(report, b"+")
    source = read(received, program_bytes, filter_bytes)
    run(source, report, lambda: write(report, read(received, secret_bytes, filter_bytes + program_bytes)))


if __name__ == "__main__":
    main()
