"""What GPUs can do and cost, and how this process keeps its memory."""

import ctypes
import gc
import os
import re
import sys
from typing import NamedTuple

GIB = 2**30


# The one table of GPUs, for plans, reports and the MFU. Speeds are those of the vendors' data sheets, dense, without
# sparsity. Memory is what CUDA reports: the data sheet's without what driver and error correction keep. Prices are
# assumptions: set your own for a budget that matters.
class GpuSpec(NamedTuple):
    """One type of GPU; FLOP/s are limits of matrix products."""

    device: str  # the name that CUDA reports, or its beginning
    memory_gib: float
    half_flops: float  # 16-bit, with float32 sums
    single_flops: float  # float32; TF32 where the GPU has it, since `runtime.init` allows it
    fp8_flops: float | None  # None where torch has no 8-bit products
    link_bytes_per_second: float  # to the other GPUs of its node, in one direction (NVLink, else PCIe as measured)
    network_bytes_per_second: float  # its share of the node's network, in one direction; assumed
    dollars_per_hour: float  # assumed


GPU_SPECS = {
    "t4": GpuSpec("Tesla T4", 14.6, 65e12, 8.1e12, None, 12e9, 3e9, 0.35),
    "v100": GpuSpec("Tesla V100", 15.8, 125e12, 15.7e12, None, 150e9, 12.5e9, 0.55),
    "rtx3060": GpuSpec("NVIDIA GeForce RTX 3060", 11.7, 25.5e12, 12.7e12, None, 20e9, 1e9, 0.10),
    "rtx3070": GpuSpec("NVIDIA GeForce RTX 3070", 7.8, 40.6e12, 20.3e12, None, 20e9, 1e9, 0.10),
    "rtx3090": GpuSpec("NVIDIA GeForce RTX 3090", 23.6, 71e12, 35.6e12, None, 20e9, 1e9, 0.25),
    "rtx4070": GpuSpec("NVIDIA GeForce RTX 4070", 11.7, 58.3e12, 29.1e12, 116.6e12, 20e9, 1e9, 0.20),
    "rtx4080": GpuSpec("NVIDIA GeForce RTX 4080", 15.6, 97.5e12, 48.7e12, 195e12, 20e9, 1e9, 0.30),
    "rtx4090": GpuSpec("NVIDIA GeForce RTX 4090", 23.5, 165e12, 82.6e12, 330e12, 20e9, 1e9, 0.40),
    "rtx5090": GpuSpec("NVIDIA GeForce RTX 5090", 31.3, 209e12, 105e12, 419e12, 40e9, 1e9, 0.70),
    "rtx6000-ada": GpuSpec("NVIDIA RTX 6000 Ada", 47.4, 364e12, 182e12, 728e12, 20e9, 3e9, 0.80),
    "a10g": GpuSpec("NVIDIA A10G", 22.1, 70e12, 35e12, None, 20e9, 3e9, 0.75),
    "l4": GpuSpec("NVIDIA L4", 22.0, 121e12, 60.5e12, 242e12, 20e9, 3e9, 0.70),
    "l40s": GpuSpec("NVIDIA L40S", 44.4, 362e12, 181e12, 733e12, 20e9, 12.5e9, 1.00),
    "a100-40gb": GpuSpec("NVIDIA A100-SXM4-40GB", 39.4, 312e12, 156e12, None, 300e9, 25e9, 1.30),
    "a100-40gb-pcie": GpuSpec("NVIDIA A100-PCIE-40GB", 39.4, 312e12, 156e12, None, 20e9, 12.5e9, 1.20),
    "a100-80gb": GpuSpec("NVIDIA A100", 79.1, 312e12, 156e12, None, 300e9, 25e9, 1.80),
    "h100-pcie": GpuSpec("NVIDIA H100 PCIe", 79.1, 756e12, 378e12, 1513e12, 50e9, 25e9, 2.40),
    "h100-nvl": GpuSpec("NVIDIA H100 NVL", 93.0, 835e12, 417e12, 1671e12, 300e9, 25e9, 2.60),
    "h100": GpuSpec("NVIDIA H100", 79.1, 989e12, 494e12, 1979e12, 450e9, 50e9, 3.00),
    "gh200": GpuSpec("NVIDIA GH200", 94.5, 989e12, 494e12, 1979e12, 450e9, 25e9, 2.50),
    "h200-nvl": GpuSpec("NVIDIA H200 NVL", 139.7, 835e12, 417e12, 1671e12, 450e9, 50e9, 3.20),
    "h200": GpuSpec("NVIDIA H200", 139.7, 989e12, 494e12, 1979e12, 450e9, 50e9, 3.50),
    "b200": GpuSpec("NVIDIA B200", 178.3, 2250e12, 1125e12, 4500e12, 900e9, 50e9, 5.00),
    "gb200": GpuSpec("NVIDIA GB200", 184.0, 2500e12, 1250e12, 5000e12, 900e9, 50e9, 6.00),
    # 32 GB, of which Metal recommends two thirds; Apple's 10.4 TFLOP/s of 32 cores, taken to be the same in 16 bits.
    "m1-max": GpuSpec("Apple M1 Max", 21.3, 10.4e12, 10.4e12, None, 20e9, 1e9, 0.0),
    "mi300x": GpuSpec("AMD Instinct MI300X", 191.5, 1307e12, 653e12, 2614e12, 64e9, 50e9, 2.50),
}  # fmt: skip


# What may follow a row's name: memory and form factor of the same chip. "H100 NVL" or "RTX 3060 Ti" is another one.
VARIANT = re.compile(r"([ -](\d+ ?GB|HBM\de?|SXM\d|PCIE|PCIe|Generation))*", re.IGNORECASE)


def gpu_spec(device: str) -> GpuSpec | None:
    """Return the row of a GPU by the name that CUDA reports ("NVIDIA H100 80GB HBM3"), or None; the longest match."""
    rows = [m for m in GPU_SPECS.values() if device.startswith(m.device) and VARIANT.fullmatch(device[len(m.device) :])]
    return max(rows, key=lambda m: len(m.device), default=None)


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
MMAP_THRESHOLD_BYTES = 32 * 2**20  # the largest that glibc accepts


def tune_allocator() -> None:
    """Keep freed memory in the process, in huge pages where torch can; does nothing where the C library cannot.

    Call it before torch is imported; variables that are set already stay. A training step on the CPU allocates and
    frees the same large buffers over and over. By default glibc gives them back to the kernel, which hands out zeroed
    4 KiB pages again: 35,000 page faults a step at depth 4 (see experiments/RESULTS.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
        # Segments that grow: less of a full GPU is lost between blocks of different sizes.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # glibc has it, other C libraries may not.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt and mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def freeze_garbage() -> None:
    """Exclude all existing Python objects from later garbage collections; call it after the first step.

    A full collection over the objects of torch, jax and a compiled step takes 0.3 s, in the middle of a step, and on
    each of several ranks at another time.
    """
    gc.collect()
    gc.freeze()


def release_memory() -> None:
    """Undo `freeze_garbage` and free what a finished run leaves, compiled graphs too, for the process's next run."""
    import torch

    gc.unfreeze()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
