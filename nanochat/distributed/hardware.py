"""Where a run was made, for its report: the code's git state and size, the machine and its price, versions.

What GPUs can do and hold, for plans and for the MFU: one table, read by `runtime` and by `planner`.

Rates are those of the vendors' data sheets, dense, without sparsity. Memory is what CUDA reports on such a card: the
data sheet's less what driver and error correction keep. Prices are no facts but assumptions, to be set anew for a
budget that matters.

How this process gets memory and gives it back: glibc's, CUDA's and Python's settings, in one place.

A training step on the CPU allocates and frees the same large buffers over and over. By default glibc gives them back to
the kernel, which hands out zeroed 4 KiB pages again: 35,000 page faults a step at depth 4 (see experiments/RESULTS.md).
"""

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

GIB = 2**30


class GpuSpec(NamedTuple):
    """One type of GPU.

    Attributes:
        device: what CUDA calls it, or the beginning of that.
        memory_gib: memory that CUDA reports. half_flops, single_flops: limit of matrix products in FLOP/s: 16-bit with
            float32 sums, and float32 without TF32. fp8_flops: of 8-bit ones; None where there are none in torch.
        link_bytes_per_second: to the other GPUs of its node, in one direction (NVLink, else PCIe as measured).
        network_bytes_per_second: its share of the node's network, in one direction; assumed.
        dollars_per_hour: assumed.
    """

    device: str
    memory_gib: float
    half_flops: float
    single_flops: float
    fp8_flops: float | None
    link_bytes_per_second: float
    network_bytes_per_second: float
    dollars_per_hour: float


GPU_SPECS = {
    "rtx3070": GpuSpec("NVIDIA GeForce RTX 3070", 7.8, 40.6e12, 20.3e12, None, 20e9, 1e9, 0.10),
    "rtx3060": GpuSpec("NVIDIA GeForce RTX 3060", 11.7, 25.5e12, 12.7e12, None, 20e9, 1e9, 0.10),
    "rtx4070": GpuSpec("NVIDIA GeForce RTX 4070", 11.7, 58.3e12, 29.1e12, 116.6e12, 20e9, 1e9, 0.20),
    "rtx3090": GpuSpec("NVIDIA GeForce RTX 3090", 23.6, 71e12, 35.6e12, None, 20e9, 1e9, 0.25),
    "rtx4090": GpuSpec("NVIDIA GeForce RTX 4090", 23.5, 165e12, 82.6e12, 330e12, 20e9, 1e9, 0.40),
    "rtx5090": GpuSpec("NVIDIA GeForce RTX 5090", 31.3, 209e12, 105e12, 419e12, 40e9, 1e9, 0.70),
    "l4": GpuSpec("NVIDIA L4", 22.0, 121e12, 30.3e12, 242e12, 20e9, 3e9, 0.70),
    "l40s": GpuSpec("NVIDIA L40S", 44.4, 362e12, 91.6e12, 733e12, 20e9, 12.5e9, 1.00),
    "a100-40gb": GpuSpec("NVIDIA A100-SXM4-40GB", 39.4, 312e12, 19.5e12, None, 300e9, 25e9, 1.30),
    "a100-80gb": GpuSpec("NVIDIA A100", 79.1, 312e12, 19.5e12, None, 300e9, 25e9, 1.80),
    "h100-pcie": GpuSpec("NVIDIA H100 PCIe", 79.1, 756e12, 51e12, 1513e12, 50e9, 25e9, 2.40),
    "h100": GpuSpec("NVIDIA H100", 79.1, 989e12, 67e12, 1979e12, 450e9, 50e9, 3.00),
    "h200": GpuSpec("NVIDIA H200", 139.7, 989e12, 67e12, 1979e12, 450e9, 50e9, 3.50),
    "b200": GpuSpec("NVIDIA B200", 178.3, 2250e12, 75e12, 4500e12, 900e9, 50e9, 5.00),
    "gb200": GpuSpec("NVIDIA GB200", 184.0, 2500e12, 80e12, 5000e12, 900e9, 50e9, 6.00),
}  # fmt: skip


def gpu_spec(device: str) -> GpuSpec | None:
    """Return the row of a GPU by what CUDA calls it ("NVIDIA H100 80GB HBM3"), or None; the longest name counts."""
    rows = [m for m in GPU_SPECS.values() if re.match(rf"{re.escape(m.device)}\b(?! (Ti|SUPER|Laptop|Mobile))", device)]
    return max(rows, key=lambda m: len(m.device), default=None)


ROOT = Path(__file__).resolve().parents[1]
PRICES = {"H100": 3.00, "A100": 1.79, "V100": 0.55}  # dollars an hour of one GPU; guesses, as all prices
OTHER_PRICE = 2.00
PACKAGES = ("torch", "tensordict", "tiktoken", "tokenizers", "datasets", "pyarrow", "orbax-checkpoint", "jax", "numpy")


class GitInfo(NamedTuple):
    """State of a checkout: the commit's hash and subject, its branch, files that differ from it."""

    commit: str
    subject: str
    branch: str
    changed: int


class CodeSize(NamedTuple):
    """Size of the code base: its own Python and HTML files, without the tests; packages that it asks for."""

    files: int
    lines: int
    bytes: int
    dependencies: int


def git_info(root: Path = ROOT) -> GitInfo | None:
    """Return the state of the checkout, or None where there is none, or no git."""
    found = [
        _git(root, "log", "-1", "--format=%H%n%s"),
        _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
        _git(root, "status", "--porcelain"),
    ]
    if any(text is None for text in found):
        return None
    commit, branch, status = map(str, found)
    digest, _, subject = commit.partition("\n")
    return GitInfo(digest, subject.strip(), branch.strip(), len(status.splitlines()))


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def code_size(root: Path = ROOT) -> CodeSize:
    """Return the size of the code at `root`."""
    paths = [root / "launch.py", *(p for folder in ("nanochat", "experiments") for p in (root / folder).rglob("*"))]
    contents = [path.read_bytes() for path in paths if path.suffix in (".py", ".html") and path.is_file()]
    project = root / "pyproject.toml"
    needs = tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"] if project.exists() else []
    return CodeSize(len(contents), sum(c.count(b"\n") for c in contents), sum(map(len, contents)), len(needs))


def versions() -> dict[str, str]:
    """Return Python's version, CUDA's if torch has it, and those of the packages that matter and are installed."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


def gpus() -> list[str]:
    """Return the names of this machine's CUDA devices."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def system_info() -> dict[str, str]:
    """Return what this machine is, by name, for people."""
    import torch

    found = {}
    if names := gpus():
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        memory = torch.cuda.get_device_properties(0).total_memory
        found["GPU"] = f"{kinds}, {memory / 2**30:.0f} GiB each"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["CPU"] = f"{_cpu()}, {cores} cores"
    if hasattr(os, "sysconf"):  # not on Windows
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return found | {"system": platform.platform(terse=True)}


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def dollars_per_hour(names: Sequence[str]) -> float | None:
    """Return the price of these GPUs together, an estimate; None for none: a CPU has no price here."""
    price = {name: next((p for kind, p in PRICES.items() if kind in name.upper()), OTHER_PRICE) for name in names}
    return sum(price[name] for name in names) if names else None


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
MMAP_THRESHOLD_BYTES = 32 * 2**20  # the largest that glibc accepts


def tune_allocator() -> bool:
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


def freeze_garbage() -> None:
    """Take all Python objects there are out of later garbage collections; for after the first step, which makes most.

    A full collection over what torch, jax and a compiled step leave behind stops a process for 0.3 s, in the middle of
    a step, and on each of several ranks at another time.
    """
    gc.collect()
    gc.freeze()


def release_memory() -> None:
    """Undo `settle` and give back what a finished run leaves, compiled graphs too: for the next one in this process."""
    import torch

    gc.unfreeze()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
