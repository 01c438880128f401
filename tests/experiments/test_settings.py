"""The ranges of all settings of all experiments, and the names of runs: refused before anything is written."""

import importlib
import typing
from pathlib import Path
from typing import Any

import pytest

from experiments import convert, pretrain, speedrun
from nanochat import distributed
from nanochat.config import Settings, UserError, explain, flatten, override
from nanochat.optim import OptimConfig
from nanochat.train import EvalConfig, StageConfig

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "experiments").glob("[!_]*.py"))
SIGNED = "seed"  # any integer of 64 bits
FRACTIONS = {"memory_budget", "warmdown_ratio", "final_lr_fraction", "mfu"}


def numbers(config: Any, prefix: str = "") -> list[tuple[str, bool]]:
    """Return (dotted name, whether it may have decimals) of every setting that is a number, or several."""
    found = []
    for name, hint in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), {hint, *typing.get_args(hint)}
        if isinstance(value, Settings):
            found += numbers(value, f"{prefix}{name}.")
        elif kinds & {int, float} or any(typing.get_args(kind)[:1] in ((int,), (float,)) for kind in kinds):
            found.append((f"{prefix}{name}", "float" in str(hint)))
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_number_setting_refuses_what_is_out_of_its_range(experiment: str) -> None:
    config = importlib.import_module(f"experiments.{experiment}").config()
    text = explain(config)
    for name, decimals in numbers(config):
        leaf = name.rpartition(".")[2]
        if leaf == SIGNED:
            with pytest.raises(UserError, match="expected an integer of at most 64 bits"):
                override(config, [f"{name}={2**64}"])
            continue
        wrong = ["-2", *["-1e-9", "inf", "-inf"] * decimals]
        for value in [*wrong, *["1.5"] * (leaf in FRACTIONS)]:
            with pytest.raises(UserError, match=rf"^{name}=\S+: must be (at least|above|from) ") as error:
                override(config, [f"{name}={value}"])
            allowed = str(error.value).partition(": must be ")[2]
            assert f"  {name}: " in text and f"({allowed})" in text, "--help shows the range"
    missing = {name for name, value in flatten(config) if type(value) in (int, float)}
    assert missing <= {name for name, _ in numbers(config)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(matrix_lr=-0.02), "matrix_lr=-0.02: must be at least 0"),
        (lambda: OptimConfig(warmup_steps=-5), "warmup_steps=-5: must be at least 0"),
        (lambda: OptimConfig(weight_decay=float("nan")), "weight_decay=nan: must be at least 0"),
        (lambda: EvalConfig(top_k=-1), "top_k=-1: must be at least 0"),
        (lambda: StageConfig(name="a/b"), "name='a/b': must be a name"),
    ],
)
def test_settings_made_in_python_are_checked_too(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


NAMES = ("../../x", "/abs", "a/b", ".", "..", ".hidden", "-x", "a\0b", "a\nb", "back\\slash", "", "é" * 101, "x" * 256)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experiment", ["pretrain", "sft", "rl", "midtrain", "quickstart", "speedrun", "convert"])
def test_names_that_are_no_folder_of_runs_are_refused(experiment: str, name: str, base: Path) -> None:
    config = importlib.import_module(f"experiments.{experiment}").config()
    with pytest.raises(UserError, match=r"^name='.*': must be a name of 1 to 200 bytes") as error:
        override(config, [f"name={name}"])
    assert "\n" not in str(error.value) and list(base.iterdir()) == []


@pytest.mark.parametrize("name", ["d20", "d20-lr=0.02", "über 2", "a..b", "x" * 200])
def test_names_of_folders_are_taken(name: str) -> None:
    for config in (pretrain.config(), speedrun.config(), convert.config()):
        assert override(config, [f"name={name}"]).name == name


def test_name_derived_from_a_foreign_folder_is_checked(tmp_path: Path, base: Path) -> None:
    from nanochat.train import init_from

    here = distributed.init("cpu")
    with pytest.raises(UserError, match=r"name='.hidden_sft': must be a name"):
        init_from.load_base(StageConfig(), "sft", here, run=str(tmp_path / ".hidden"), step=None, stages=())
