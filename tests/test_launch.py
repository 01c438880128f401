"""The command line: what it says, its exit codes, and the same under torchrun."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat.config import flatten

ROOT = Path(__file__).parents[1]
Launch = Callable[..., int]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

TOY = '''
"""Add numbers up.

Command: torchrun launch.py --experiment=toy
"""

import dataclasses
import time

from nanochat.config import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part.

    Attributes:
        rate: how fast it goes.
    """

    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 4
    fail: str = ""
    resume: bool = False
    device: str = "cpu"
    args: tuple[str, ...] = ()
    inner: Inner = Inner()


def config():
    return Config()


def run(config, runtime):
    print(f"depth={config.depth} rate={config.inner.rate} resume={config.resume} args={config.args} {runtime.device}")
    if config.fail == "user" or (config.fail == "rank1" and runtime.rank == 1):
        raise UserError(f"data/x.parquet: cannot be read by rank {runtime.rank}; download it again")
    if config.fail == "bug":
        raise ZeroDivisionError("internal")
    if config.fail == "package":
        import wandb
    if config.fail == "unknown package":
        import no_such_package
    if config.fail in ("wait", "rank1"):
        print("waiting", flush=True)
        time.sleep(60)
'''
EXTRA = '"""Need more."""\nimport uvicorn\n'
BARE = '''
"""Do nothing at all."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    pass


def config():
    return Config()


def run(config, runtime):
    print("bare", runtime.world_size)
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with launch.py and experiments of its own."""
    folder = tmp_path / "project"
    (folder / "experiments").mkdir(parents=True)
    for name in ("launch.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, code in {"toy": TOY, "bare": BARE, "_hidden": BARE, "extra": EXTRA}.items():
        (folder / "experiments" / f"{name}.py").write_text(code.lstrip())
    return folder


@pytest.fixture
def launch(project: Path, monkeypatch: Patch) -> Iterator[Launch]:
    """Call launch.main in this process, from another current folder; returns the exit code."""
    monkeypatch.chdir(project.parent)
    monkeypatch.syspath_prepend(project)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("experiments", "launch")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    module = importlib.import_module("launch")
    handler = signal.getsignal(signal.SIGINT)
    yield lambda *words: module.main(["launch.py", *words])
    signal.signal(signal.SIGINT, handler)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("experiments", "launch")]:
        del sys.modules[name]


def start(project: Path, *words: str, processes: int = 0) -> subprocess.Popen[str]:
    """Start launch.py as a process of its own, under torchrun where `processes` is not 0."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *torchrun, str(project / "launch.py"), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=project.parent, env=env, stdout=pipe, stderr=pipe, text=True)


def test_settings_flags_and_words_reach_the_experiment(launch: Launch, capsys: Capture) -> None:
    words = ("--experiment=toy", "--set", "depth=2**3", "--set=inner.rate=1e-3", "a,b", "--resume", "c")
    assert launch(*words) == 0
    assert capsys.readouterr().out == "depth=8 rate=0.001 resume=True args=('a,b', 'c') cpu\n"


def test_help(launch: Launch, capsys: Capture) -> None:
    for flag in ("--help", "-h"):
        assert launch(flag) == 0
        out = capsys.readouterr().out
        assert "  toy               Add numbers up.\n" in out and "  bare              Do nothing at all.\n" in out
        assert "hidden" not in out and "Command:" not in out and "--set" in out and "--resume" in out
    assert launch("--experiment=toy", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("Add numbers up.") and "Command: torchrun launch.py --experiment=toy" in out
    assert "  inner.rate: float = 0.5\n      how fast it goes\n" in out and "depth=" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no --experiment given; there are: bare, extra, toy"),
        (["--experiment=tyo"], "--experiment=tyo: no such experiment; did you mean toy?"),
        (["--experiment=_hidden"], "--experiment=_hidden: no such experiment"),
        (["toy"], "no --experiment given; did you mean toy?"),
        (["--expriment=toy"], "Unknown command line flag 'expriment'. Did you mean: experiment ?"),
        (["--experiment"], "Missing value for flag --experiment"),
        (["--experiment=toy", "--set", "inner.rat=1"], "--set inner.rat: no such setting; did you mean inner.rate?"),
        (["--experiment=bare", "--resume"], "--resume: bare has nothing to resume"),
        (["--experiment=bare", "word"], "word: unexpected argument; change a setting with --set name=value"),
    ],
)
def test_wrong_usage_ends_with_2(launch: Launch, capsys: Capture, words: list[str], message: str) -> None:
    assert launch(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_user_error_is_one_line(launch: Launch, capsys: Capture) -> None:
    assert launch("--experiment=toy", "--set", "fail=user") == 1
    assert capsys.readouterr().err == "error: data/x.parquet: cannot be read by rank 0; download it again\n"
    assert launch("--experiment=toy", "--set", "device=abacus") == 1
    assert capsys.readouterr().err == "error: device=abacus: expected auto, cpu, cuda or mps\n"


@pytest.mark.parametrize(
    ("fail", "last"), [("bug", "ZeroDivisionError: internal\n"), ("unknown package", "named 'no_such_package'\n")]
)
def test_other_exceptions_show_where_they_come_from(launch: Launch, capsys: Capture, fail: str, last: str) -> None:
    assert launch("--experiment=toy", "--set", f"fail={fail}") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "toy.py" in err and err.endswith(last)


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [(["--experiment=extra"], "uvicorn", "serve"), (["--experiment=toy", "--set=fail=package"], "wandb", "track")],
)
def test_a_missing_package_names_its_extra(launch: Launch, capsys: Capture, monkeypatch: Patch, words, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # pyright: ignore[reportArgumentType] (None: its import fails)
    assert launch(*words) == 1
    assert capsys.readouterr().err == f'error: the package {package} is missing: pip install -e ".[{extra}]"\n'


def test_the_process_group_is_left_at_the_end_and_not_after_an_error(launch: Launch, monkeypatch: Patch) -> None:
    """After an error of one rank, leaving would wait for the others, which wait for this one."""
    from nanochat.distributed import runtime

    closed = []
    monkeypatch.setattr(runtime, "close", lambda: closed.append(True))
    for fail in ("", "user", "bug"):
        launch("--experiment=toy", "--set", f"fail={fail}")
        assert len(closed) == 1


def test_usage_errors_and_help_do_not_import_torch(project: Path) -> None:
    (project / "torch.py").write_text("raise SystemExit('torch was imported')")
    for args, code in (("", 2), ("--help", 0), ("--experiment=tyo", 2), ("--experiment=toy --help", 0)):
        process = start(project, *args.split())
        out, err = process.communicate(timeout=300)
        assert process.returncode == code and "torch was imported" not in out + err


def test_removed_names_are_answered_with_the_new_ones(launch: Launch, capsys: Capture, monkeypatch: Patch) -> None:
    from experiments import _renamed

    monkeypatch.setitem(_renamed.EXPERIMENTS, "gone", "--experiment=toy --set depth=3")
    assert launch("--experiment=gone") == 2
    assert capsys.readouterr().err == "error: --experiment=gone: is now --experiment=toy --set depth=3\n"


def test_table_of_removed_names_points_to_existing_ones() -> None:
    from experiments import _renamed

    names = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    settings = {n for name in names for n, _ in flatten(importlib.import_module(f"experiments.{name}").config())}
    for old, new in _renamed.EXPERIMENTS.items():
        assert old not in names and new.split()[0].removeprefix("--experiment=") in names
    for old, new in _renamed.SETTINGS.items():
        assert " " in new or any(f".{name}".endswith(f".{new.partition('=')[0]}") for name in settings), (old, new)


@pytest.mark.slow
def test_ctrl_c_is_one_line(project: Path) -> None:
    process = start(project, "--experiment=toy", "--set", "fail=wait")
    assert process.stdout and process.stdout.readline().startswith("depth=4")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, "stopped by Ctrl-C\n")


@pytest.mark.slow
def test_torchrun_shows_a_mistake_once_and_in_its_summary(project: Path) -> None:
    process = start(project, "--experiment=tyo", processes=2)
    _, err = process.communicate(timeout=300)
    line = "error: --experiment=tyo: no such experiment; did you mean toy?"
    assert process.returncode != 0
    assert err.splitlines().count(line) == 1 and "exitcode  : 2" in err and f"traceback : {line}" in err


@pytest.mark.slow
def test_torchrun_shows_the_error_of_the_rank_that_has_it(project: Path) -> None:
    process = start(project, "--experiment=toy", "--set", "fail=rank1", processes=2)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and out.count("waiting\n") == 1
    shown = [text for text in err.splitlines() if text.startswith("error:")]
    assert shown == ["error: data/x.parquet: cannot be read by rank 1; download it again"]
