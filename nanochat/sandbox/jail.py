"""Inside the sandbox: start a process that drops its privileges and runs the program, and clean up after it.

Never imported: `bubblewrap` passes this text to a fresh interpreter, so it needs the standard library only. Descriptor
0 holds the system call filter, the program, and a secret that is sent back after the program's last line. The first
byte sent to the report descriptor says that the program starts: `+`, or `!` if it can read the parent's memory.

Source: the manual pages landlock(7), capabilities(7), ptrace(2), seccomp(2), PR_SET_CHILD_SUBREAPER(2const).
"""

import _thread
import atexit
import contextlib
import ctypes
import os
import resource
import struct
import sys
import types
from collections.abc import Callable

FILE_NAME = "program.py"
SIGKILL = 9  # importing `signal` takes milliseconds
RESERVE_BYTES = 16 * 2**20  # memory withheld from the program, so that a MemoryError can be reported
SPARE_BYTES = 4 * 2**20  # memory freed first, because raising the limit takes a little memory itself


class FilterProgram(ctypes.Structure):
    # The kernel's struct sock_fprog
    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def check(code: int, what: str) -> None:
    if code != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def supervise(program: int, stop: int) -> None:
    """Wait for the program, or kill it when the parent says so or is gone; then exit like it, and leave no process.

    In a namespace this is process 1, which takes all others with it; elsewhere it adopts the orphans.
    """

    def kill_when_told() -> None:
        os.read(stop, 1)
        os.kill(program, SIGKILL)

    _thread.start_new_thread(kill_when_told, ())
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as children:
        while pids := children.read().split():
            for pid in pids:
                os.kill(int(pid), SIGKILL)
                os.waitpid(int(pid), 0)
            children.seek(0)
    os._exit(code if code >= 0 else 128 - code)


def mount_folder(libc: ctypes.CDLL, folder_bytes: int, folder_files: int) -> None:
    """Mount an empty, limited /tmp in memory."""
    options = f"size={folder_bytes},nr_inodes={folder_files},mode=700".encode()
    nosuid_nodev_noexec = 2 | 4 | 8
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(nosuid_nodev_noexec), options), "mount /tmp")
    os.chdir("/tmp")


def drop_capabilities(libc: ctypes.CDLL, keep: int = 0) -> None:
    """Drop all capabilities that are not in the bit mask `keep`."""
    version_3, this_process = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, this_process)
    words = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of 0 to 31, then of 32 to 63
    check(libc.capget(header, words), "capget")
    check(libc.capset(header, (ctypes.c_uint32 * 6)(words[0] & keep, words[1] & keep)), "capset")


def restrict_files(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Landlock: allow to read `readable` and to write in this folder, and no access to processes outside."""
    create_ruleset, add_rule, restrict_self, path_beneath = 444, 445, 446, 1
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    version = libc.syscall(create_ruleset, None, ctypes.c_size_t(0), 1)
    every_right = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    tcp, signals_and_sockets = 3 * (version >= 4), 3 * (version >= 6)
    attributes = struct.pack("QQQ", every_right, tcp, signals_and_sockets)
    ruleset = libc.syscall(create_ruleset, attributes, ctypes.c_size_t(len(attributes)), 0)
    check(min(ruleset, 0), "landlock")
    rights = {path: execute | read_file | read_dir * os.path.isdir(path) for path in readable}
    for path, allowed in {**rights, os.devnull: read_file | write_file, os.getcwd(): every_right}.items():
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", allowed, descriptor)
            check(libc.syscall(add_rule, ruleset, path_beneath, rule, 0), "landlock")
            os.close(descriptor)
    check(libc.syscall(restrict_self, ruleset, 0), "landlock")
    os.close(ruleset)


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
    set_seccomp, filter_mode = 22, 2
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


def restrict_weakly(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Drop what this system lets a process drop without a namespace."""
    dac_override, dac_read_search = 2, 4  # the interpreter may belong to another user
    with contextlib.suppress(OSError):
        drop_capabilities(libc, keep=dac_override | dac_read_search)
    with contextlib.suppress(OSError):
        restrict_files(libc, readable)


def can_read(process: int) -> bool:
    """Return whether this process may read the environment, and so the memory, of another."""
    try:
        os.close(os.open(f"/proc/{process}/environ", os.O_RDONLY))
    except OSError:
        return sys.platform != "linux"
    return True


def main() -> None:
    report, stop, filter_bytes, program_bytes, secret_bytes = map(int, sys.argv[1:6])
    memory_bytes, cpu_seconds, folder_bytes, folder_files, enforced = map(int, sys.argv[6:11])
    readable, parent, is_linux = sys.argv[11:], os.getppid(), sys.platform == "linux"
    received = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    libc = ctypes.CDLL(None, use_errno=True)
    if enforced:
        mount_folder(libc, folder_bytes, folder_files)
        drop_capabilities(libc)
    if is_linux:
        one, zero, set_child_subreaper, set_no_new_privileges = ctypes.c_ulong(1), ctypes.c_ulong(0), 36, 38
        for option in (set_child_subreaper, set_no_new_privileges):
            check(libc.prctl(option, one, zero, zero, zero), "prctl")
    if program := os.fork():
        supervise(program, stop)
    os.close(stop)
    filtered, instructions = False, os.pread(received, filter_bytes, 0)
    if is_linux and not enforced:
        restrict_weakly(libc, readable)
    with contextlib.suppress(*() if enforced else (OSError,)):
        if instructions:
            install_filter(libc, instructions)
            filtered = True
    set_limits(memory_bytes, cpu_seconds, folder_bytes, enforced=bool(enforced), filtered=filtered)
    read, write = os.pread, os.write
    write(report, b"!" if not enforced and can_read(parent) else b"+")
    source = read(received, program_bytes, filter_bytes)
    run(source, report, lambda: write(report, read(received, secret_bytes, filter_bytes + program_bytes)))


if __name__ == "__main__":
    main()
