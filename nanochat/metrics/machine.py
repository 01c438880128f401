"""What this machine is: versions, GPUs, processor, memory and price, for reports."""

import contextlib
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from nanochat.distributed import cpu_cores, hardware

UNKNOWN_DOLLARS_PER_HOUR = 2.00
PACKAGES = ("torch", "tensordict", "tiktoken", "tokenizers", "datasets", "pyarrow", "orbax-checkpoint", "jax", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, the installed ones of PACKAGES, and CUDA."""
    import torch

    facts = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    return facts | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


def gpus() -> list[str]:
    """Return the names of this machine's CUDA devices."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def system_info() -> dict[str, str]:
    """Return a description of this machine by GPU, CPU, memory and system."""
    import torch

    facts = {}
    if names := gpus():
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        memory = torch.cuda.get_device_properties(0).total_memory
        facts["GPU"] = f"{kinds}, {memory / 2**30:.0f} GiB each"
    facts["CPU"] = f"{_cpu()}, {cpu_cores()} cores"
    if hasattr(os, "sysconf"):  # not on Windows
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return facts | {"system": platform.platform(terse=True)}


def dollars_per_hour(names: Sequence[str]) -> float | None:
    """Return the estimated price of these GPUs together; None for none: a CPU has no price here."""
    specs = [hardware.gpu_spec(name) for name in names]
    return sum(spec.dollars_per_hour if spec else UNKNOWN_DOLLARS_PER_HOUR for spec in specs) if names else None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()
