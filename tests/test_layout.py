"""The shape of the code base: import order, purity of imports, forbidden calls, docstrings, experiments."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanochat"

# A package imports only from rows above its own, a file of nanochat/ itself only from such files.
ROWS = [
    {"config", "jsonl", "lazy", "text", "transform", "tree"},
    {"distributed", "sandbox"},
    {"data", "model"},
    {"infer", "optim", "tasks"},
    {"checkpoint"},
    {"metrics"},
    {"eval"},
    {"serve", "train"},
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
MAX_FILES, MAX_LINES = 10, 650

EXPORTED = PACKAGE / "checkpoint" / "hf"  # copied into folders for transformers, never imported here
SOURCES = [*sorted(PACKAGE.glob("**/*.py")), *sorted((ROOT / "experiments").glob("**/*.py")), ROOT / "launch.py"]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for path in sorted(PACKAGE.glob("**/*.py"))
    if path.stem != "__main__" and path.parent != EXPORTED
}


def imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, inside functions as well; a page's lazy list not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the order: write `from nanochat import ...`"
            module = str(node.module)
            names |= {full if (full := f"{module}.{alias.name}") in MODULES else module for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("nanochat", "experiments", "launch")}


@pytest.mark.parametrize("name", MODULES)
def test_imports_come_from_rows_above(name: str) -> None:
    package = name.split(".")[1] if "." in name else "config"
    assert package in ROW, f"nanochat/{package} has no row in the table of tests/test_layout.py"
    for imported in imports(MODULES[name]):
        other = imported.split(".")[1]
        assert other in ROW, f"{name} imports {imported}, which is outside of the rows"
        own = other == package or ROW[package] == ROW[other] == 0  # within a package, or among the files of row 0
        assert ROW[other] < ROW[package] or own, f"{name} (row {ROW[package]}) imports {imported} (row {ROW[other]})"


def test_files_of_a_package_import_in_one_direction() -> None:
    pages = {name for name, path in MODULES.items() if path.stem == "__init__"}
    graph = {name: imports(path) - pages - {name} for name, path in MODULES.items() if name not in pages}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def test_packages_and_files_are_small() -> None:
    for folder in [path.parent for path in PACKAGE.glob("*/**/__init__.py")]:
        assert len(list(folder.glob("*.py"))) <= MAX_FILES, folder
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= MAX_LINES, path


# Imports one module after the other and prints what each of them did beside defining names.
PROBE = """
import importlib, os, sys, threading
sys.path.insert(0, sys.argv[1])
package, names = os.path.join(sys.argv[1], sys.argv[2]), sys.argv[3:]
import signal
import tensordict, torch  # what these do on import is theirs
done = []

def from_us():
    frame = sys._getframe(2)
    while "_collections_abc" in frame.f_code.co_filename or frame.f_code.co_filename in (os.__file__, "<frozen os>"):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(package)

class Spy(type(os.environ)):
    def __getitem__(self, key):
        if from_us():
            done.append(f"reads the environment variable {key}")
        return super().__getitem__(key)

def watch(event, args):
    if event == "open" and isinstance(args[0], str) and args[0] != os.devnull:
        writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(args[2], int) else 0
        if writes or set(str(args[1])) & set("wax+"):
            done.append(f"opens {args[0]} for writing")
    elif event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect", "os.system"):
        done.append(f"{event} {args[:1]}")

def state():
    return {
        "threads": sorted(t.name for t in threading.enumerate()),
        "CUDA": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_initialized(),
        "random state": torch.get_rng_state().sum().item(),
        "defaults": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()],
        "torch threads": torch.get_num_threads(),
        "signals": str([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]),
    }

os.environ.__class__ = Spy
sys.addaudithook(watch)
for name in names:
    before = state()
    importlib.import_module(name)
    after = state()
    done += [f"changes {k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k]]
    if done:
        print(name, done)
    done.clear()
"""


@pytest.mark.parametrize(
    ("package", "names"),
    [
        pytest.param("nanochat", list(MODULES), marks=pytest.mark.slow, id="nanochat"),
        pytest.param("experiments", [f"experiments.{name}" for name in EXPERIMENTS], id="experiments"),
    ],
)
def test_importing_does_nothing(package: str, names: list[str], tmp_path: Path) -> None:
    base = {"HOME": str(tmp_path), "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROBE, str(ROOT), package, *names]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | base, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# The command line checks settings before it imports torch.
EXPLAIN = """
import importlib, sys
from nanochat.config import explain
for name in sys.argv[1:]:
    explain(importlib.import_module(f"experiments.{name}").config())
    assert "torch" not in sys.modules, name
"""


def test_settings_of_every_experiment_are_read_without_torch() -> None:
    subprocess.run([sys.executable, "-c", EXPLAIN, *EXPERIMENTS], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_complete(name: str) -> None:
    module = importlib.import_module(f"experiments.{name}")
    line = (module.__doc__ or "").partition("\n")[0]
    assert 10 <= len(line) <= 115, "the first line of the docstring describes the experiment"
    config = module.config()
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert config == module.config()
    inspect.signature(module.run).bind(config, "the runtime")
