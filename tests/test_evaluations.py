"""The record of evaluations: what is written comes back, and a torn line does no harm."""

from pathlib import Path

import pytest

from nanochat import evaluations
from nanochat.config import UserError


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    assert evaluations.read(folder) == []
    evaluations.append(folder, 600, "base", {"core/CORE": 0.25, "val/bpb": 1.5}, {"core/copa": "line 3: no JSON — é"})
    evaluations.append(folder, 700, "sft", {"val/bpb": 1, "chat/GSM8K": 0.5})
    first, second = evaluations.read(folder)
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "step": 600,
        "stage": "base",
        "metrics": {"core/CORE": 0.25, "val/bpb": 1.5},
        "failed": {"core/copa": "line 3: no JSON — é"},
    }
    assert second["failed"] == {} and second["metrics"] == {"val/bpb": 1, "chat/GSM8K": 0.5}
    assert evaluations.latest(folder) == {"core/CORE": 0.25, "val/bpb": 1, "chat/GSM8K": 0.5}
    assert evaluations.latest(folder, "base") == {"core/CORE": 0.25, "val/bpb": 1.5}
    assert evaluations.latest(folder, "rl") == {}


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path) -> None:
    evaluations.append(tmp_path, 1, "base", {"a": 1.0})
    with (tmp_path / evaluations.FILE).open("ab") as file:
        file.write(b'{"time": "2026')
    assert [row["step"] for row in evaluations.read(tmp_path)] == [1]
    evaluations.append(tmp_path, 2, "base", {"a": 2.0})
    assert [row["step"] for row in evaluations.read(tmp_path)] == [1, 2]


DAMAGED = ["nonsense", "[]", '{"step": 1}', '{"time": "", "step": 1, "stage": "", "metrics": 1, "failed": {}}']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    evaluations.append(tmp_path, 1, "base", {"a": 1.0})
    with (tmp_path / evaluations.FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl:2: not a line of evaluations"):
        evaluations.read(tmp_path)


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a is nan"):
        evaluations.append(tmp_path, 1, "base", {"a": float("nan")})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        evaluations.append(tmp_path / "file", 1, "base", {"a": 1.0})
