"""Where a run was made, for its report: the code's git state and size, the machine and its price, versions."""

import os
import platform
import re
import subprocess
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
PRICES = {"H100": 3.00, "A100": 1.79, "V100": 0.55}  # dollars an hour of one GPU; guesses, as all prices
OTHER_PRICE = 2.00
PACKAGES = ("torch", "tensordict", "tiktoken", "tokenizers", "datasets", "pyarrow", "orbax-checkpoint", "jax", "numpy")


class Git(NamedTuple):
    """State of a checkout: the commit's hash and subject, its branch, files that differ from it."""

    commit: str
    subject: str
    branch: str
    changed: int


class Code(NamedTuple):
    """Size of the code base: its own Python and HTML files, without the tests; packages that it asks for."""

    files: int
    lines: int
    bytes: int
    dependencies: int


def git(root: Path = ROOT) -> Git | None:
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
    return Git(digest, subject.strip(), branch.strip(), len(status.splitlines()))


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def code(root: Path = ROOT) -> Code:
    """Return the size of the code at `root`."""
    paths = [root / "launch.py", *(p for folder in ("nanochat", "experiments") for p in (root / folder).rglob("*"))]
    contents = [path.read_bytes() for path in paths if path.suffix in (".py", ".html") and path.is_file()]
    project = root / "pyproject.toml"
    needs = tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"] if project.exists() else []
    return Code(len(contents), sum(c.count(b"\n") for c in contents), sum(map(len, contents)), len(needs))


def versions() -> dict[str, str]:
    """Return Python's version, CUDA's if torch has it, and those of the packages that matter and are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


def gpus() -> list[str]:
    """Return the names of this machine's CUDA devices."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def machine() -> dict[str, str]:
    """Return what this machine is, by name, for people."""
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
