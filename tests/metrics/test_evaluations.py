"""The record of evaluations: what is written comes back, and a torn line does no harm."""

from pathlib import Path

import pytest

from nanochat.config import UserError
from nanochat.metrics import logger


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    assert logger.read_evaluations(folder) == []
    logger.append_evaluation(
        folder, 600, "base", {"core/CORE": 0.25, "val/bpb": 1.5}, {"core/copa": "line 3: no JSON — é"}
    )
    logger.append_evaluation(folder, 700, "sft", {"val/bpb": 1, "chat/GSM8K": 0.5})
    first, second = logger.read_evaluations(folder)
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "step": 600,
        "stage": "base",
        "metrics": {"core/CORE": 0.25, "val/bpb": 1.5},
        "failed": {"core/copa": "line 3: no JSON — é"},
    }
    assert second["failed"] == {} and second["metrics"] == {"val/bpb": 1, "chat/GSM8K": 0.5}
    assert logger.latest_evaluation(folder) == {"core/CORE": 0.25, "val/bpb": 1, "chat/GSM8K": 0.5}
    assert logger.latest_evaluation(folder, "base") == {"core/CORE": 0.25, "val/bpb": 1.5}
    assert logger.latest_evaluation(folder, "rl") == {}


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path) -> None:
    logger.append_evaluation(tmp_path, 1, "base", {"a": 1.0})
    with (tmp_path / logger.EVALUATIONS_FILE).open("ab") as file:
        file.write(b'{"time": "2026')
    assert [row["step"] for row in logger.read_evaluations(tmp_path)] == [1]
    logger.append_evaluation(tmp_path, 2, "base", {"a": 2.0})
    assert [row["step"] for row in logger.read_evaluations(tmp_path)] == [1, 2]


DAMAGED = ["nonsense", "[]", '{"step": 1}', '{"time": "", "step": 1, "stage": "", "metrics": 1, "failed": {}}']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    logger.append_evaluation(tmp_path, 1, "base", {"a": 1.0})
    with (tmp_path / logger.EVALUATIONS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl:2: not a line of evaluations"):
        logger.read_evaluations(tmp_path)


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a is nan"):
        logger.append_evaluation(tmp_path, 1, "base", {"a": float("nan")})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        logger.append_evaluation(tmp_path / "file", 1, "base", {"a": 1.0})
