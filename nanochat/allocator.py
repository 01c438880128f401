"""How this process gets memory and gives it back: glibc's, CUDA's and Python's settings, in one place.

A training step on the CPU allocates and frees the same large buffers over and over. By default glibc gives them back to
the kernel, which hands out zeroed 4 KiB pages again: 35,000 page faults a step at depth 4 (see experiments/RESULTS.md).
"""

import ctypes
import gc
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
MMAP_THRESHOLD_BYTES = 32 * 2**20  # the largest that glibc accepts


def tune() -> bool:
    """Keep freed memory in the process, in huge pages where torch can; return whether the C library took it.

    Call it before torch is imported; what the environment has set already stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
        # Segments that grow: less of a full GPU is lost between blocks of different sizes.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, other C libraries may not
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def settle() -> None:
    """Take all Python objects there are out of later garbage collections; for after the first step, which makes most.

    A full collection over what torch, jax and a compiled step leave behind stops a process for 0.3 s, in the middle of
    a step, and on each of several ranks at another time.
    """
    gc.collect()
    gc.freeze()


def release() -> None:
    """Undo `settle` and give back what a finished run leaves, compiled graphs too: for the next one in this process."""
    import torch  # after `tune`

    gc.unfreeze()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
