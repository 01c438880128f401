"""Series of runs: skip finished ones, resume interrupted ones; scaling-law fits."""

import csv
import dataclasses
import itertools
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from experiments import _pipeline, pretrain, scaling_laws
from nanochat import distributed, train
from nanochat.config import UserError, base_dir, override
from nanochat.metrics import logger, run_folder
from nanochat.train import init_from

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("corpus")]

Capture = pytest.CaptureFixture[str]
Trained = list[tuple[str, bool, bool]]
TINY = ("eval.every_steps=4", "core.every_steps=none", "checkpoint.every_steps=2", "optim.matrix_lr=0.1")


def settings(*more: str) -> list[str]:
    return ["device=cpu", *(f"base.{setting}" for setting in tiny_run.settings(*TINY)), *more]


def run_series(*more: str) -> None:
    scaling_laws.run(override(scaling_laws.Config(), settings(*more)), distributed.init("cpu", "float32"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The pretraining runs that were started: (name, resume, overwrite)."""
    seen: Trained = []
    original = pretrain.run

    def watched(config: pretrain.Config, runtime: distributed.Runtime) -> None:
        seen.append((str(config.name), config.resume, config.overwrite))
        original(config, runtime)

    monkeypatch.setattr(pretrain, "run", watched)
    return seen


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: int = 3
    resume: bool = False
    device_batch_size: int = 4


def test_stage_reruns_when_settings_or_the_stage_before_change(tmp_path: Path) -> None:
    path, done = tmp_path / "marks" / "a.json", []

    def run(config: Settings, **options: Any) -> _pipeline.StageStatus:
        return _pipeline.run_if_needed(path, config, done.append, **options)

    first = run(Settings())
    assert first.state == "done" and first.completion_id and len(done) == 1
    assert run(Settings(resume=True, device_batch_size=2)) == first and len(done) == 1  # the result is the same
    status = _pipeline.read_status(path, _pipeline.settings(Settings(depth=4)))
    assert (status.state, status.changes) == ("changed", "depth 3 → 4")
    assert run(Settings(depth=4)).completion_id != first.completion_id and len(done) == 2
    assert run(Settings(depth=4), after="x").state == "done" and len(done) == 3
    run(Settings(depth=4), after="x", has_output=lambda: False)
    assert len(done) == 4, "missing output is made again"


def test_failed_stage_stays_in_progress_and_accumulates_time(tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.json", _pipeline.settings(Settings())

    def fails(_: Settings) -> None:
        raise SystemExit(143)

    for _ in range(2):
        with pytest.raises(SystemExit):
            _pipeline.run_if_needed(path, Settings(), fails)
        assert _pipeline.read_status(path, wanted).state == "in_progress"
    before = _pipeline.read_status(path, wanted).seconds
    after = _pipeline.run_if_needed(path, Settings(), lambda _: None).seconds
    assert 0 < before < after
    path.write_text("{")
    with pytest.raises(UserError, match="delete it"):
        _pipeline.read_status(path, wanted)


def test_interrupted_depth_series_resumes_and_skips_finished_runs(trained: Trained, capsys: Capture):
    series = ("series=depths", "name=mini", "depths=1,2", "base.num_iterations=8")
    with tiny_run.stop_after(5, "mini_d2"):
        run_series(*series)
    folder = base_dir() / "miniseries" / "mini"
    assert [row["depth"] for row in results(folder)] == ["1"], "finished runs are in the table"
    run_series(*series)
    assert trained == [("mini_d1", False, False), ("mini_d2", False, False), ("mini_d2", True, False)]
    assert "resumed from step 5" in capsys.readouterr().out
    rows = results(folder)
    assert list(rows[0]) == list(scaling_laws.COLUMNS)
    for row, depth in zip(rows, (1, 2), strict=True):
        info = run_folder.read_run(train.run_folder(f"mini_d{depth}"))
        assert row["run"] == info.name and row["depth"] == str(depth) and row["steps"] == "8" and row["core"] == ""
        assert float(row["val_bpb"]) == logger.curve(info.rows, "val/bpb")[1][-1]
        assert float(row["flops"]) == 8 * (run_folder.step_flops(info) or 0) and row["tokens"] == str(8 * 256)
        assert [r["step"] for r in info.rows if "train/loss" in r] == list(range(1, 9))
    for file in ("bpb.svg", "curves.svg"):
        assert ET.parse(folder / file).getroot().tag.endswith("svg")
    assert not (folder / "core.svg").exists()
    run_series(*series)
    assert len(trained) == 3 and "already done" in capsys.readouterr().out


def test_changed_setting_retrains_after_failed_start(trained: Trained, monkeypatch, capsys: Capture):
    series = ("series=depths", "name=again", "depths=1", "base.num_iterations=4")
    run_series(*series)
    with monkeypatch.context() as patch:
        patch.setattr(init_from, "open_checkpoints", lambda *_: (_ for _ in ()).throw(UserError("the disk is on fire")))
        with pytest.raises(UserError, match="on fire"):
            run_series(*series, "base.optim.matrix_lr=0.05")
    assert "rerun: optim.matrix_lr 0.1 → 0.05" in capsys.readouterr().out
    for _ in range(2):
        run_series(*series, "base.optim.matrix_lr=0.05")
    # The second start must not take the old run's checkpoint for the new one's.
    assert trained == [("again_d1", False, False), ("again_d1", False, True), ("again_d1", False, True)]


def test_run_of_another_command_is_not_modified(trained: Trained):
    tiny_run.pretrain_run("depth=1", "name=mine_d1", "num_iterations=2")
    series = ("series=depths", "name=mine", "base.num_iterations=2")
    with pytest.raises(UserError, match=r"made by another command.*name="):
        run_series(*series, "depths=1")
    assert len(trained) == 1
    with pytest.raises(UserError, match="each once"):
        run_series(*series, "depths=1,1")


def test_budget_series_spends_budgets_and_skips_finished_runs(trained: Trained, capsys: Capture):
    series = ("name=laws", "base.num_iterations=none", "base.eval.every_steps=none")
    run_series(*series, "depths=1,2,3", "budgets=6e8,1.2e9")
    folder = base_dir() / "scaling_laws" / "laws"
    rows = results(folder)
    cells = [(float(row["flops_budget"]), int(row["depth"])) for row in rows]
    assert cells == list(itertools.product((6e8, 1.2e9), (1, 2, 3)))
    for row in rows:
        step = float(row["flops"]) / int(row["steps"])
        assert abs(float(row["flops"]) - float(row["flops_budget"])) <= step / 2 + 1, "to the nearest step"
    assert ET.parse(folder / "isoflop.svg").getroot().tag.endswith("svg")
    out = capsys.readouterr().out
    assert "flops_budget" in out and ("best N" in out or "no optimum" in out)
    run_series(*series, "depths=1,2,3", "budgets=6e8,1.2e9")
    assert len(trained) == 6, "finished runs are skipped"
    run_series(*series, "depths=2", "budgets=6e8,1.2e9,4e8")
    assert trained[6:] == [("laws_4e8_d2", False, False)], "a larger sweep keeps finished runs"


def test_num_iterations_and_invalid_budgets_raise() -> None:
    with pytest.raises(UserError, match="num_iterations"):
        run_series("base.num_iterations=3")
    with pytest.raises(UserError, match=r"budgets=0\.0: must be above 0"):
        run_series("base.num_iterations=none", "budgets=1,0")


def chinchilla(params: float, budget: float) -> tuple[float, float]:
    """Return (tokens, loss) of a law L = E + A / N^0.34 + B / D^0.28, with C = 6 N D."""
    tokens = budget / (6 * params)
    return tokens, 0.8 + 40.0 / params**0.34 + 30.0 / tokens**0.28


def test_fit_recovers_optimum_and_exponents_of_known_law() -> None:
    rows = []
    for budget in (1e18, 1e19, 1e20):
        # dL / dN = 0 at N^(0.34 + 0.28) = (0.34 A / 0.28 B) (C / 6)^0.28
        best = (0.34 * 40 / (0.28 * 30) * (budget / 6) ** 0.28) ** (1 / 0.62)
        for factor in (0.4, 0.6, 0.9, 1.3, 2.0):
            tokens, loss = chinchilla(best * factor, budget)
            rows.append({"flops_budget": budget, "params_scaling": best * factor, "tokens": tokens, "val_bpb": loss})
        optimum = scaling_laws.optima(rows)[-1]
        assert optimum.inside and optimum.params == pytest.approx(best, rel=0.02)
        assert optimum.tokens == pytest.approx(chinchilla(best, budget)[0], rel=0.02)
        assert optimum.bpb == pytest.approx(chinchilla(best, budget)[1], abs=2e-4)
        assert optimum.curve(math.log(optimum.params)) == pytest.approx(optimum.bpb, abs=1e-6)
    text = scaling_laws.laws(scaling_laws.optima(rows))
    # a = 0.28 / 0.62 = 0.4516, b = 0.34 / 0.62 = 0.5484
    assert "N ~ C^0.452, D ~ C^0.548, from 3 budgets" in text


def test_optimum_outside_trained_depths_is_ignored() -> None:
    def rows(*bpb: float) -> list[dict[str, float]]:
        row = {"flops_budget": 1.0}
        return [row | {"params_scaling": n, "tokens": 1 / n, "val_bpb": y} for n, y in zip((10.0, 20.0, 40.0), bpb)]

    (optimum,) = scaling_laws.optima(rows(1.3, 1.1, 1.0))
    text = scaling_laws.laws([optimum])
    assert not optimum.inside and "not used" in text and "no exponents" in text
    assert scaling_laws.optima(rows(1.0, 1.2, 1.0)) == [] and "no optimum" in scaling_laws.laws([])
    assert scaling_laws.optima(rows(1.3, 1.1)) == []
