"""The inner side of `nanochat.sandbox`: closes the doors behind itself, then runs the program it was given.

Never imported: its text is what the fresh interpreter runs, so it needs the standard library only. What it was sent
lies in descriptor 0: the system call filter, the program, and at the end a secret, which is read and sent back after
the program has run to its very end. Its first byte on the report's descriptor says that the program begins.
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
RESERVE_BYTES = 16 * 2**20
"""Kept back of the memory, so that a program that has used up all of it can still be reported."""
SPARE_BYTES = 4 * 2**20
"""Freed first of all then: raising the limit takes a little memory itself."""


class Instruction(ctypes.Structure):
    """What the kernel calls sock_fprog."""

    _fields_ = (("count", ctypes.c_ushort), ("first", ctypes.c_char_p))


def require(answer: int, what: str) -> None:
    """Raise where a function of the C library says that it failed."""
    if answer != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount_folder(libc: ctypes.CDLL, folder_bytes: int, folder_files: int) -> None:
    """Put an empty folder in memory where the program may write, and give up the right to do so again."""
    options = f"size={folder_bytes},nr_inodes={folder_files},mode=700".encode()
    nosuid_nodev_noexec = 2 | 4 | 8
    require(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(nosuid_nodev_noexec), options), "mount /tmp")
    os.chdir("/tmp")
    version_3, this_process = 0x20080522, 0
    none = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; two words each
    require(libc.capset((ctypes.c_uint32 * 2)(version_3, this_process), none), "capset")


def limit(memory_bytes: int, cpu_seconds: int, folder_bytes: int, *, enforced: bool, filtered: bool) -> None:
    """Set what the kernel counts. Without `enforced`, a limit that the system does not know is left out."""
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


def restrict(libc: ctypes.CDLL, program: bytes) -> None:
    """Hand the system call filter to the kernel; from here on it binds this process and cannot be taken back."""
    set_no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    zero = ctypes.c_ulong(0)
    require(libc.prctl(set_no_new_privileges, ctypes.c_ulong(1), zero, zero, zero), "no_new_privs")
    instructions = Instruction(len(program) // 8, program)
    require(libc.prctl(set_seccomp, ctypes.c_ulong(filter_mode), ctypes.byref(instructions)), "seccomp")


def describe(error: BaseException) -> bytes:
    """Return the error as the last line of a traceback says it, cut to a length that a pipe takes at once."""
    try:
        text = str(error)
    except BaseException as second:  # the program's own __str__ may do anything
        text = f"<unprintable: {type(second).__name__}>"
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SystemExit):
        line += " (the program left before its last line)"
    return line[:2000].encode("utf-8", "replace")


def show(error: BaseException, source: bytes) -> None:
    """Print the traceback as Python does, with the program's lines, without this file's."""
    import linecache
    import traceback

    lines = source.decode("utf-8", "replace").splitlines(True)
    linecache.cache[FILE_NAME] = (len(source), None, lines, FILE_NAME)
    trace = error.__traceback__ and error.__traceback__.tb_next
    traceback.print_exception(type(error), error, trace)


def run(source: bytes, report: int, finish: Callable[[], object]) -> None:
    """Run the program as `__main__`; call `finish` when the interpreter ends, if the program came to its last line.

    Whatever the program leaves by before that, SystemExit(0) as well, is an error.
    """
    write, exit_process, set_limit = os.write, os._exit, resource.setrlimit  # a program may replace them
    main = types.ModuleType("__main__")
    main.__file__ = FILE_NAME
    sys.modules["__main__"] = main
    sys.argv[:] = [FILE_NAME]
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    ended, everything, spare = [], (hard, hard), bytes(SPARE_BYTES)
    atexit.register(lambda: ended and finish())  # the first to be registered is the last to be called
    try:
        exec(compile(source, FILE_NAME, "exec"), main.__dict__)
        ended.append(True)
    except BaseException as error:
        del spare
        with contextlib.suppress(OSError, ValueError):
            set_limit(resource.RLIMIT_AS, everything)
        write(report, (b"m" if isinstance(error, MemoryError) else b"e") + describe(error))
        with contextlib.suppress(BaseException):  # reported it is; now it only has to end
            if not isinstance(error, SystemExit):
                show(error, source)
            sys.stdout.flush()
            sys.stderr.flush()
        exit_process(1)


def main() -> None:
    """Read what was sent, close the doors, say so, and run the program."""
    report, filter_bytes, program_bytes, secret_bytes = map(int, sys.argv[1:5])
    memory_bytes, cpu_seconds, folder_bytes, folder_files, enforced = map(int, sys.argv[5:])
    sent = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    libc = ctypes.CDLL(None, use_errno=True)
    if enforced:
        mount_folder(libc, folder_bytes, folder_files)
    limit(memory_bytes, cpu_seconds, folder_bytes, enforced=bool(enforced), filtered=filter_bytes > 0)
    if filter_bytes:
        restrict(libc, os.pread(sent, filter_bytes, 0))
    read, write = os.pread, os.write
    write(report, b"+")
    source = read(sent, program_bytes, filter_bytes)
    run(source, report, lambda: write(report, read(sent, secret_bytes, filter_bytes + program_bytes)))


if __name__ == "__main__":
    main()
