"""Overrides: parsing by annotation, unknown names, groups; flatten and describe."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import UsageError, UserError, describe, flatten, nearest, override, parse


@dataclasses.dataclass(frozen=True)
class Optim:
    embedding_lr: float = 0.3
    matrix_lr: float = 0.02
    betas: tuple[float, float] = (0.8, 0.95)


@dataclasses.dataclass(frozen=True)
class Model:
    depth: int = 4
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "run"
    resume: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    columns: tuple[str, ...] = ("text",)
    sizes: tuple[int, ...] = ()
    folder: Path = Path("runs")
    cap: int | float | None = None
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    made: int = dataclasses.field(default=7, init=False)
    optim: Optim = Optim()
    model: Model = Model()


def test_override_sets_leaves_at_any_depth_and_leaves_the_rest() -> None:
    before = Config()
    after = override(before, ["optim.matrix_lr=0.5", "name=x=y", "model.depth=12", "model.depth=20", "resume=yes"])
    expected = Config(name="x=y", resume=True, optim=Optim(matrix_lr=0.5), model=Model(depth=20))
    assert after == expected
    assert before == Config()
    assert override(before, []) is before


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("model.depth=2**19", "model.depth", 2**19),
        ("model.depth=80*2**19", "model.depth", 80 * 2**19),
        ("model.depth=1e6", "model.depth", 1_000_000),
        ("model.depth=1_000", "model.depth", 1000),
        ("model.depth=-3", "model.depth", -3),
        ("model.depth = 5 ", "model.depth", 5),
        ("model.width=none", "model.width", None),
        ("model.width=None", "model.width", None),
        ("model.width=64", "model.width", 64),
        ("cap=0.5", "cap", 0.5),
        ("cap=3", "cap", 3),
        ("optim.matrix_lr=1e-3", "optim.matrix_lr", 0.001),
        ("optim.matrix_lr=inf", "optim.matrix_lr", float("inf")),
        ("optim.betas=0.9,0.99", "optim.betas", (0.9, 0.99)),
        ("optim.betas=(0.9, 0.99)", "optim.betas", (0.9, 0.99)),
        ("columns=a, b", "columns", ("a", "b")),
        ("columns=", "columns", ()),
        ("sizes=[1,2**4]", "sizes", (1, 16)),
        ("resume=0", "resume", False),
        ("resume=ON", "resume", True),
        ("dtype=BFloat16", "dtype", "bfloat16"),
        ("name=", "name", ""),
        ("name=none", "name", "none"),
        ("folder=a/b", "folder", Path("a/b")),
    ],
)
def test_values_are_parsed_by_the_annotation(assignment: str, name: str, value: Any) -> None:
    found = dict(flatten(override(Config(), [assignment])))[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.depth=2**-1", "--set model.depth=2**-1: expected a whole number"),
        ("model.depth=9**9**9", "expected a whole number"),
        ("model.depth=2**999999999999", "expected a whole number"),
        ("model.depth=0.5", "expected a whole number"),
        ("model.depth=nan", "expected a whole number"),
        ("model.depth=inf", "expected a whole number"),
        ("model.depth=", "expected a whole number"),
        ("model.depth=none", "expected a whole number"),
        ("model.depth=2*", "expected a whole number"),
        ("model.width=wide", "expected a whole number or none"),
        ("optim.matrix_lr=fast", "expected a number"),
        ("optim.matrix_lr=nan", "expected a number"),
        ("optim.betas=0.9", "expected 2 values with commas between them, got 1"),
        ("optim.betas=0.9,0.9,0.9", "expected 2 values with commas between them, got 3"),
        ("sizes=1,b", "expected a whole number"),
        ("resume=maybe", "expected true or false"),
        ("dtype=bfloat", "expected one of auto, float32, bfloat16; did you mean bfloat16"),
        ("table=1", "cannot be set from the command line"),
        ("made=1", "--set made: no such setting"),
        ("model.depht=1", "--set model.depht: no such setting; did you mean model.depth?"),
        ("depth=1", "no such setting; did you mean model.depth?"),
        ("embeding_lr=1", "did you mean optim.embedding_lr"),
        ("model=1", "--set model: is a group of settings; set one of model.depth, model.width"),
        ("name.x=1", "--set name.x: no such setting"),
        ("zzzzqqq=1", "there are: name, resume, dtype"),
        ("resume", "--set resume: expected name=value"),
        ("=1", "no such setting"),
    ],
)
def test_a_wrong_override_is_one_clear_line(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        override(Config(), [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_nearest_prefers_the_exact_leaf() -> None:
    names = ["optim.matrix_lr", "optim.matrix_wd", "train.matrices"]
    assert nearest("matrix_lr", names) == "; did you mean optim.matrix_lr?"
    assert nearest("quickstrat", ["quickstart", "pretrain", "data"]) == "; did you mean quickstart?"
    assert nearest("x", []) == "; there are none"


@given(st.integers())
def test_whole_numbers_come_back(number: int) -> None:
    assert parse(str(number), int) == number


@given(st.floats(allow_nan=False))
def test_numbers_come_back(number: float) -> None:
    assert parse(repr(number), float) == number


@given(st.text())
def test_parsing_any_text_gives_a_value_or_a_value_error(text: str) -> None:
    for annotation, kind in ((int, int), (float, float), (bool, bool), (tuple[int, ...], tuple)):
        try:
            assert isinstance(parse(text, annotation), kind)
        except ValueError as error:
            assert "expected" in str(error)


def test_flatten_and_describe_name_every_leaf_in_order() -> None:
    names = [name for name, _ in flatten(Config())]
    assert names[-5:] == ["optim.embedding_lr", "optim.matrix_lr", "optim.betas", "model.depth", "model.width"]
    lines = describe(override(Config(), ["model.depth=20"])).splitlines()
    assert len(lines) == len(names)
    assert [line.split()[0] for line in lines] == names
    assert lines[-2].split() == ["model.depth", "20"]
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in lines if len(line.split()) == 2}) == 1
