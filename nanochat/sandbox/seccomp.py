"""The seccomp filter of a sandboxed program, compiled by libseccomp.

An allow-list of what a single Python process does with memory, time, its own files and threads. Known unwanted calls
fail with EPERM, any other with ENOSYS, which lets the C library fall back to an older call. No process, program or
socket can be created (except socketpair, which asyncio needs), and no memory outside the address space limit.

Source: the manual pages seccomp(2), seccomp_init(3), seccomp_rule_add(3).
"""

import ctypes
import errno
import functools
import os
from collections.abc import Callable

from nanochat.config import UserError

LIBRARY = "libseccomp.so.2"
MIN_STACK_BYTES = 2**20  # so that the address space bounds the number of threads

# Descriptors; files; memory; threads and what a process asks about itself; signals; time.
_ALLOWED = """
read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek close close_range dup dup2 dup3 fcntl
pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2
timerfd_create timerfd_settime timerfd_gettime sendfile copy_file_range flock fsync fdatasync ftruncate truncate
fallocate fadvise64 sendto recvfrom sendmsg recvmsg shutdown getsockopt getsockname getpeername

open openat creat stat fstat lstat newfstatat statx access faccessat faccessat2 statfs fstatfs getcwd chdir fchdir
mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat readlink readlinkat
chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask utime utimes utimensat getdents getdents64
listxattr llistxattr flistxattr getxattr lgetxattr fgetxattr

munmap mprotect mremap madvise brk msync mincore membarrier

futex futex_waitv set_robust_list get_robust_list rseq set_tid_address arch_prctl exit exit_group wait4 waitid
sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_min sched_get_priority_max
getcpu getpid gettid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getgroups getresuid getresgid
capget getrlimit setrlimit getpriority getrusage uname sysinfo getrandom

tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
restart_syscall pause

alarm getitimer setitimer nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
"""

# Harmless in a process namespace of its own; without one they reach the user's other processes.
_SIGNALS = ("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")

# Only decides between EPERM and ENOSYS: everything that is not allowed is refused.
_DENIED = """
fork vfork execve execveat socket connect bind listen accept accept4 kill tkill ptrace process_vm_readv
process_vm_writev pidfd_open pidfd_getfd pidfd_send_signal mount umount2 unshare setns pivot_root chroot keyctl
add_key request_key bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register memfd_create
memfd_secret shmget msgget semget mq_open mknod mknodat reboot init_module finit_module delete_module kexec_load
setuid setgid setpgid setsid inotify_init1 fanotify_init quotactl swapon sethostname personality
"""

_CLONE_THREAD, _MAP_STACK, _AF_UNIX = 0x10000, 0x20000, 1
# TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_PRCTLS = (15, 16, 0x53564D41)  # names of threads and of memory mappings

_ALLOW, _DENY, _UNKNOWN, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
_BAD_ARCHITECTURE, _OPTIMIZE = 2, 8  # attributes
_NOT_EQUAL, _EQUAL, _GREATER_EQUAL, _MASKED_EQUAL = 1, 4, 5, 7  # comparisons


class _Condition(ctypes.Structure):
    """libseccomp's struct scmp_arg_cmp; for `_MASKED_EQUAL`, `a` is the mask and `b` the value."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


_ARGUMENT_TYPES = {
    "seccomp_init": (ctypes.c_uint32,),
    "seccomp_attr_set": (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
    "seccomp_rule_add_array": (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p),
    "seccomp_export_bpf": (ctypes.c_void_p, ctypes.c_int),
    "seccomp_release": (ctypes.c_void_p,),
}


@functools.cache
def compile_filter(*, allow_signals: bool) -> bytes:
    """Return the BPF program for `prctl(PR_SET_SECCOMP, …)`.

    Args:
        allow_signals: allow kill and similar calls; only for a process in a namespace of its own.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise UserError("the sandbox needs libseccomp: apt-get install libseccomp2 (or your package)") from error
    library.seccomp_init.restype = ctypes.c_void_p
    for name, types in _ARGUMENT_TYPES.items():
        getattr(library, name).argtypes = types
    context = library.seccomp_init(_UNKNOWN)
    if not context:
        raise UserError(f"{LIBRARY}: seccomp_init failed")
    try:
        _call(library.seccomp_attr_set, context, _BAD_ARCHITECTURE, _KILL)
        _call(library.seccomp_attr_set, context, _OPTIMIZE, 2)  # binary search instead of a chain of comparisons
        _add_rules(library, context, allow_signals)
        descriptor = os.memfd_create("seccomp")
        with open(descriptor, "rb") as file:
            _call(library.seccomp_export_bpf, context, descriptor)
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _add_rules(library: ctypes.CDLL, context: int, allow_signals: bool) -> None:
    def add(action: int, name: str, *conditions: tuple[int, int, int, int]) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # negative: unknown to this architecture or version of the library
            array = (_Condition * len(conditions))(*(_Condition(*condition) for condition in conditions))
            _call(library.seccomp_rule_add_array, context, action, number, len(conditions), array)

    allowed = {*_ALLOWED.split(), *(_SIGNALS if allow_signals else ())}
    for name in allowed:
        add(_ALLOW, name)
    for name in {*_DENIED.split()} - allowed:
        add(_DENY, name)
    add(_ALLOW, "clone", (0, _MASKED_EQUAL, _CLONE_THREAD, _CLONE_THREAD))
    add(_DENY, "clone", (0, _MASKED_EQUAL, _CLONE_THREAD, 0))
    add(_ALLOW, "socketpair", (0, _EQUAL, _AF_UNIX, 0))
    add(_DENY, "socketpair", (0, _NOT_EQUAL, _AF_UNIX, 0))
    add(_ALLOW, "prlimit64", (0, _EQUAL, 0, 0))  # 0: the calling process
    add(_DENY, "prlimit64", (0, _NOT_EQUAL, 0, 0))
    add(_ALLOW, "mmap", (3, _MASKED_EQUAL, _MAP_STACK, 0))
    add(_ALLOW, "mmap", (3, _MASKED_EQUAL, _MAP_STACK, _MAP_STACK), (1, _GREATER_EQUAL, MIN_STACK_BYTES, 0))
    for name, argument, values in (("ioctl", 1, _IOCTLS), ("prctl", 0, _PRCTLS)):
        for value in values:
            add(_ALLOW, name, (argument, _EQUAL, value, 0))


def _call(function: Callable[..., int], *arguments: object) -> None:
    code = function(*arguments)
    if code < 0:
        raise UserError(f"{LIBRARY}: {function.__name__}{arguments[1:]} failed: {os.strerror(-code)}")
