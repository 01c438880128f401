"""metrics.jsonl and evaluations.jsonl: round trips, resuming, corruption; TensorBoard and wandb; the moving average."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.config import UserError
from nanochat.metrics import logger

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@dataclasses.dataclass(frozen=True)
class Config:
    folder: Path = Path("a/b")
    betas: tuple[float, ...] = (0.9, float("inf"))
    dtype: torch.dtype = torch.bfloat16
    seed: int | None = None


def write_metrics(folder: Path, steps: range, resume_step: int | None = None) -> bytes:
    """Write a line of loss a step, and one of an evaluation every other step; return the file."""
    log = logger.open_log(folder, resume_step=resume_step)
    for step in steps:
        logger.write(log, step, {"loss": 1 / step if step != 3 else math.nan, "tokens": step * 100})
        if step % 2 == 0:
            logger.write(log, step, {"bits_per_byte": 2 / step})
    logger.close(log)
    return (folder / "metrics.jsonl").read_bytes()


def test_written_lines_are_read_back(tmp_path: Path) -> None:
    content = write_metrics(tmp_path / "new" / "run", range(1, 3))
    assert content.decode().splitlines() == [
        '{"step": 1, "loss": 1.0, "tokens": 100}',
        '{"step": 2, "loss": 0.5, "tokens": 200}',
        '{"step": 2, "bits_per_byte": 1.0}',
    ]
    rows = logger.read(tmp_path / "new" / "run")
    assert logger.curve(rows, "loss") == ([1, 2], [1.0, 0.5])
    assert logger.curve(rows, "bits_per_byte") == ([2], [1.0])
    assert logger.curve(rows, "nothing") == ([], [])
    assert logger.read(tmp_path / "elsewhere") == []


def test_nonfinite_numbers_are_strings_and_tensors_are_numbers(tmp_path: Path) -> None:
    log = logger.open_log(tmp_path)
    values: dict[str, Any] = {"t": torch.tensor(0.25), "b": torch.tensor(2.0, dtype=torch.bfloat16), "done": True}
    logger.write(log, 1, values | dict(zip("xyz", NOT_FINITE)))
    logger.close(log)
    logger.close(log)
    line = '{"step": 1, "t": 0.25, "b": 2.0, "done": 1, "x": "nan", "y": "inf", "z": "-inf"}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line
    (row,) = logger.read(tmp_path)
    assert math.isnan(row["x"]) and (row["y"], row["z"], row["t"]) == (math.inf, -math.inf, 0.25)


@pytest.mark.parametrize("stopped", [1, 2, 3, 6])
@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b"\xff\xfe"])
def test_resumed_file_equals_an_unbroken_one(tmp_path: Path, stopped: int, torn: bytes) -> None:
    unbroken = write_metrics(tmp_path / "a", range(1, 7))
    write_metrics(tmp_path / "b", range(1, 7))  # went on past the checkpoint of step `stopped`, then was killed
    with (tmp_path / "b" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert len(logger.read(tmp_path / "b")) == 9
    assert write_metrics(tmp_path / "b", range(stopped + 1, 7), resume_step=stopped) == unbroken
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", [b"x", b'{"loss": 1}', b"[1]", b'{"step": "x"}', b"\x00\x00"])
def test_corrupt_line_is_named_and_the_file_left_alone(tmp_path: Path, damage: bytes) -> None:
    bad = write_metrics(tmp_path, range(1, 2)) + damage + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(bad)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of metrics; delete that line"):
        logger.open_log(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == bad


def test_new_run_keeps_the_old_file_under_another_name(tmp_path: Path) -> None:
    first, second, _ = (write_metrics(tmp_path, range(1, end)) for end in (3, 5, 4))
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == first
    assert (tmp_path / "metrics.2.jsonl").read_bytes() == second


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = logger.open_log(tmp_path / "run", enabled=False, tensorboard=True, wandb="project", config=object())
    logger.write(log, 1, {"loss": 1.0})
    logger.close(log)
    assert not (tmp_path / "run").exists()


WRITES_FOREVER = """
import itertools, sys
from pathlib import Path
from nanochat.metrics import logger
log = logger.open_log(Path(sys.argv[1]))
for step in itertools.count(1):
    logger.write(log, step, {"loss": 1 / step, "a_name_that_makes_the_line_longer": float(step)})
"""


def test_killed_process_loses_no_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES_FOREVER, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        while len(before := logger.read(tmp_path)) < 200 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    rows = logger.read(tmp_path)
    assert len(rows) >= len(before) >= 200
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_disk_errors_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be written: "):
        logger.open_log(tmp_path / "file" / "run")
    log = logger.open_log(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        logger.write(log, 1, {"loss": 1.0})


def test_config_is_written(tmp_path: Path) -> None:
    logger.close(logger.open_log(tmp_path, config=Config()))
    expected = {"folder": "a/b", "betas": [0.9, "inf"], "dtype": "torch.bfloat16", "seed": None}
    assert json.loads((tmp_path / "config.json").read_text()) == expected


@pytest.mark.parametrize(("option", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb")])
def test_a_missing_tracker_names_the_extra_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any], package: str
) -> None:
    before = write_metrics(tmp_path, range(1, 4))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=rf'the package {package} is missing: pip install -e "\.\[track\]"'):
        logger.open_log(tmp_path, config=Config(), **option)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        log = logger.open_log(tmp_path, tensorboard=True, resume_step=resume_step)
        for step in steps:
            logger.write(log, step, {"train/loss": step / 2})
        logger.close(log)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


def test_wandb_gets_the_same_numbers_and_a_resumed_run_its_old_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resume_step in (None, 1, None):
        log = logger.open_log(tmp_path, wandb="nanochat-test", config=Config(), resume_step=resume_step)
        logger.write(log, 1, {"train/loss": 0.5})
        assert log.wandb.config["dtype"] == "torch.bfloat16"
        assert dict(log.wandb.summary)["train/loss"] == 0.5
        ids.append(log.wandb.id)
        logger.close(log)
    assert ids[0] == ids[1] != ids[2]


def test_ema_is_debiased_and_ignores_nonfinite_values() -> None:
    state, means = None, []
    for value in (4.0, 2.0, 3.0):
        state, mean = logger.ema(state, value)
        means.append(mean)
        assert all(logger.ema(state, x) == (state, mean) for x in NOT_FINITE)
    assert means == pytest.approx([4.0, (0.9 * 4 + 2) / 1.9, (0.81 * 4 + 0.9 * 2 + 3) / 2.71])
    assert means == logger.smoothed((4.0, 2.0, 3.0))
    assert logger.ema(json.loads(json.dumps(state)), 1.5) == logger.ema(state, 1.5)
    assert math.isnan(logger.ema(None, math.nan)[1])


def test_appended_evaluations_are_read_without_a_partial_last_line(tmp_path: Path) -> None:
    folder, failed = tmp_path / "runs" / "new", {"core/copa": "line 3: no JSON — é"}
    assert logger.read_evaluations(folder) == []
    logger.append_evaluation(folder, 600, "base", {"core/CORE": 0.25}, failed)
    with (folder / logger.EVALUATIONS_FILE).open("ab") as file:
        file.write(b'{"time": "2026')
    logger.append_evaluation(folder, 700, "sft", {"val/bpb": 1, "chat/GSM8K": 0.5})
    first, second = logger.read_evaluations(folder)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 600, "stage": "base", "metrics": {"core/CORE": 0.25}, "failed": failed}
    assert second["failed"] == {} and second["metrics"] == {"val/bpb": 1, "chat/GSM8K": 0.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        logger.append_evaluation(folder, 1, "base", {"a": math.nan})


@pytest.mark.parametrize("line", ["[]", '{"time": "", "step": 1, "stage": "", "metrics": 1, "failed": {}}'])
def test_corrupt_evaluation_is_named(tmp_path: Path, line: str) -> None:
    logger.append_evaluation(tmp_path, 1, "base", {"a": 1.0})
    with (tmp_path / logger.EVALUATIONS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl:2: not a line of evaluations"):
        logger.read_evaluations(tmp_path)
