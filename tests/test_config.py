"""Overrides: parsing by annotation, unknown names, groups; flatten and describe."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import UsageError, describe, explain, flatten, nearest, override, parse


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
    assert after == Config(name="x=y", resume=True, optim=Optim(matrix_lr=0.5), model=Model(depth=20))
    assert before == Config() and override(before, []) is before


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("model.depth=80*2**19", "model.depth", 80 * 2**19),
        ("model.depth=1e6", "model.depth", 1_000_000),
        ("model.depth = 5 ", "model.depth", 5),
        ("model.width=none", "model.width", None),
        ("columns=none", "columns", ()),
        ("cap=0.5", "cap", 0.5),
        ("cap=3", "cap", 3),
        ("optim.betas=0.9,0.99", "optim.betas", (0.9, 0.99)),
        ("columns=a, b", "columns", ("a", "b")),
        (r"columns=a\,b, c", "columns", ("a,b", "c")),
        ("sizes=[1,2**4]", "sizes", (1, 16)),
        ("resume=ON", "resume", True),
        ("dtype=BFloat16", "dtype", "bfloat16"),
        ("name=", "name", ""),
        ("name=none", "name", "none"),
        ("folder=a/b", "folder", Path("a/b")),
    ],
)
def test_values_are_parsed_by_the_annotation(assignment: str, name: str, value: Any) -> None:
    parsed = dict(flatten(override(Config(), [assignment])))[name]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.depth=2**-1", "--set model.depth=2**-1: expected an integer"),
        ("model.depth=9**9**9", "expected an integer"),
        ("model.depth=none", "expected an integer"),
        ("model.depth=1e30", "expected an integer of at most 64 bits"),
        ("model.depth=-2**64", "expected an integer of at most 64 bits"),
        ("optim.matrix_lr=nan", "expected a number"),
        ("optim.betas=0.9", "expected 2 values separated by commas, got 1"),
        ("resume=maybe", "expected true or false"),
        ("dtype=bfloat", "expected one of auto, float32, bfloat16; did you mean bfloat16"),
        ("table=1", "cannot be set from the command line"),
        ("made=1", "--set made: no such setting"),
        ("model.depht=1", "--set model.depht: no such setting; did you mean model.depth?"),
        ("depth=1", "no such setting; did you mean model.depth?"),
        ("model=1", "--set model: is a group of settings; set one of model.depth, model.width"),
        ("zzzzqqq=1", "there are: name, resume, dtype"),
        ("resume", "--set resume: expected name=value"),
        ("=1", "no such setting"),
    ],
)
def test_a_wrong_override_is_one_clear_line(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        override(Config(), [assignment])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nearest_prefers_the_exact_leaf() -> None:
    names = ["optim.matrix_lr", "optim.matrix_wd", "train.matrices"]
    assert nearest("matrix_lr", names) == "; did you mean optim.matrix_lr?"
    assert nearest("quickstrat", ["quickstart", "pretrain", "data"]) == "; did you mean quickstart?"
    assert nearest("x", []) == "; there are none"
    names = ["seed", "optim.embedding_lr", "optim.matrix_lr", "device_batch_size", "total_batch_size"]
    for short in ("lr", "learning_rate"):  # stands for all longer names
        assert nearest(short, names) == "; did you mean optim.embedding_lr or optim.matrix_lr?"
    assert nearest("batch_size", names) == "; did you mean device_batch_size or total_batch_size?"


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
    assert [line.split()[0] for line in lines] == names
    assert lines[-2].split() == ["model.depth", "20"]


def test_renamed_settings_are_answered_with_the_new_name() -> None:
    renamed = {"adam_betas": "betas", "dtype=half": "dtype=bfloat16"}
    for assignment, answer in {
        "optim.adam_betas=1,2": "--set optim.adam_betas: is now optim.betas",
        "dtype=half": "--set dtype=half: is now dtype=bfloat16",
        "dtype=third": "--set dtype=third: expected one of",
    }.items():
        with pytest.raises(UsageError, match=f"^{answer}"):
            override(Config(), [assignment], renamed)


@dataclasses.dataclass(frozen=True)
class Documented(Model):
    """Settings with their meanings.

    Attributes:
        depth: number of layers; more of them learn more,
            and cost more. folder: where to write.
        tokens, kind: what they are: both.
    """

    folder: Path | None = None
    tokens: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] | None = "a"
    inner: Model = Model()


def test_explain_shows_type_default_and_meaning() -> None:
    assert explain(Documented()).splitlines() == [
        "  depth: int = 4",
        "      number of layers; more of them learn more, and cost more",
        "  width: int | none = none",
        "  folder: Path | none = none",
        "      where to write",
        "  tokens: int,… = 1,2",
        "      what they are: both",
        "  kind: a | b | none = a",
        "      what they are: both",
        "  inner.depth: int = 4",
        "  inner.width: int | none = none",
    ]
