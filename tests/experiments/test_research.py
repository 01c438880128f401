"""Series of runs: skip finished ones, resume interrupted ones; scaling-law fits."""

import csv
import dataclasses
import itertools
import math
import os
import signal
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as gloo
import tiny_run

from experiments import pretrain, scaling_laws
from nanochat import distributed
from nanochat.config import UserError, override
from nanochat.data import tokenizer
from nanochat.metrics import logger, run_folder
from nanochat.train import config as stage
from nanochat.train import pipeline
from nanochat.train import stage as runs

pytestmark = pytest.mark.slow

TINY = (
    *("compile=false", "model.sequence_len=32", "model.aspect_ratio=32", "model.head_dim=32", "model.window_pattern=L"),
    *("device_batch_size=4", "total_batch_size=256", "checkpoint.every_steps=2", "eval.every_steps=4"),
    *(
        "eval.tokens=256",
        "eval.sample_tokens=2",
        "eval.prompts=the cat",
        "metrics.every_steps=1",
        "core.every_steps=none",
    ),
    *("train.chunk_tokens=50", "data.buffer_docs=20", "optim.matrix_lr=0.1"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with a tokenizer and a folder of small documents."""
    folder = tmp_path_factory.mktemp("base")
    texts = tiny_run.write_corpus(folder)
    tokenizer.save(tokenizer.train(texts, 300), folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setattr(runs, "peak_flops", lambda *_: (1e12, "made up"))  # measuring it takes longer than the runs
        yield folder


def series_of_depths() -> scaling_laws.Config:
    return override(scaling_laws.config(), ["series=depths"])


def tiny(config: Any, base: Path, *more: str) -> Any:
    shared = [f"base.{setting}" for setting in (*TINY, f"data.source={base / 'text'}")]
    return override(config, [*shared, "device=cpu", *more])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, bool]]:
    """The pretraining runs that were started: (name, resume, overwrite)."""
    seen: list[tuple[str, bool, bool]] = []
    original = pretrain.run

    def watched(config: pretrain.Config, runtime: distributed.Runtime) -> None:
        seen.append((str(config.name), config.resume, config.overwrite))
        original(config, runtime)

    monkeypatch.setattr(pretrain, "run", watched)
    return seen


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Status of stages


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: int = 3
    resume: bool = False
    device_batch_size: int = 4


def test_stage_reruns_when_settings_change(tmp_path: Path) -> None:
    path, done = tmp_path / "marks" / "a.json", []

    def run(config: Settings, after: str = "") -> pipeline.StageStatus:
        return pipeline.run_if_needed(path, pipeline.settings(config, after), lambda _: done.append(config))

    first = run(Settings())
    assert first.state == "done" and first.completion_id and len(done) == 1
    assert run(Settings(resume=True, device_batch_size=2)) == first and len(done) == 1, (
        "settings that keep the result are ignored"
    )
    status = pipeline.read_status(path, pipeline.settings(Settings(depth=4)))
    assert (status.state, pipeline.reasons(status)) == ("changed", "depth 3 → 4")
    second = run(Settings(depth=4))
    assert len(done) == 2 and second.completion_id != first.completion_id
    assert run(Settings(depth=4), after="x").state == "done" and len(done) == 3, (
        "a new completion of the earlier stage counts"
    )
    assert pipeline.run_if_needed(
        path, pipeline.settings(Settings(depth=4), "x"), lambda _: done.append(0), has_output=bool
    )
    assert done[-1] == 0, "missing output is made again"


def test_failed_stage_stays_in_progress_and_accumulates_time(tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.json", pipeline.settings(Settings())

    def fails(_: dict[str, bool]) -> None:
        raise SystemExit(143)

    for _ in range(2):
        with pytest.raises(SystemExit):
            pipeline.run_if_needed(path, wanted, fails)
        assert pipeline.read_status(path, wanted).state == "in_progress"
    before = pipeline.read_status(path, wanted).seconds
    after = pipeline.run_if_needed(path, wanted, lambda _: None).seconds
    assert 0 < before < after
    path.write_text("{")
    with pytest.raises(UserError, match="delete it"):
        pipeline.read_status(path, wanted)


# Series of depths


def test_interrupted_depth_series_resumes_and_skips_finished_runs(
    base: Path,
    trained: list[tuple[str, bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime = distributed.init("cpu", "float32")
    config = tiny(series_of_depths(), base, "name=mini", "depths=1,2", "base.num_iterations=8")
    original = logger.write

    def interrupted(log: Any, step: int, values: Any) -> None:
        original(log, step, values)
        if step == 5 and "d2" in str(log.file and log.file.name):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logger, "write", interrupted)
    with pytest.raises(SystemExit) as stop:
        scaling_laws.run(config, runtime)
    assert stop.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(logger, "write", original)
    folder = base / "miniseries" / "mini"
    assert [row["depth"] for row in results(folder)] == ["1"], "finished runs are in the table"
    scaling_laws.run(config, runtime)
    assert trained == [("mini_d1", False, False), ("mini_d2", False, False), ("mini_d2", True, False)]
    assert "resumed from step 5" in capsys.readouterr().out
    rows = results(folder)
    assert list(rows[0]) == list(scaling_laws.COLUMNS)
    for row, depth in zip(rows, (1, 2), strict=True):
        info = run_folder.read_run(stage.run_folder(f"mini_d{depth}"))
        assert row["run"] == info.name and row["depth"] == str(depth) and row["steps"] == "8" and row["core"] == ""
        assert float(row["val_bpb"]) == logger.curve(info.rows, "val/bpb")[1][-1]
        assert float(row["flops"]) == 8 * (run_folder.step_flops(info) or 0) and row["tokens"] == str(8 * 256)
        assert [r["step"] for r in info.rows if "train/loss" in r] == list(range(1, 9))
    for file in ("bpb.svg", "curves.svg"):
        assert ET.parse(folder / file).getroot().tag.endswith("svg")
    assert not (folder / "core.svg").exists()
    scaling_laws.run(config, runtime)
    assert len(trained) == 3 and "already done" in capsys.readouterr().out


def test_changed_setting_retrains_after_failed_start(
    base: Path,
    trained: list[tuple[str, bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime = distributed.init("cpu", "float32")
    config = tiny(series_of_depths(), base, "name=again", "depths=1", "base.num_iterations=4")
    scaling_laws.run(config, runtime)
    other = override(config, ["base.optim.matrix_lr=0.05"])
    with monkeypatch.context() as patch:
        patch.setattr(runs, "open_checkpoints", lambda *_: (_ for _ in ()).throw(UserError("the disk is on fire")))
        with pytest.raises(UserError, match="on fire"):
            scaling_laws.run(other, runtime)
    assert "rerun: optim.matrix_lr 0.1 → 0.05" in capsys.readouterr().out
    scaling_laws.run(other, runtime)
    # The second start must not take the old run's checkpoint for the new one's.
    assert trained == [("again_d1", False, False), ("again_d1", False, True), ("again_d1", False, True)]
    scaling_laws.run(other, runtime)
    assert len(trained) == 3


def test_run_of_another_command_is_not_modified(base: Path, trained: list[tuple[str, bool, bool]]) -> None:
    runtime = distributed.init("cpu", "float32")
    config = tiny(series_of_depths(), base, "name=mine", "depths=1", "base.num_iterations=2")
    pretrain.run(dataclasses.replace(config.base, depth=1, name="mine_d1", device="cpu"), runtime)
    with pytest.raises(UserError, match=r"made by another command.*name="):
        scaling_laws.run(config, runtime)
    assert len(trained) == 1
    with pytest.raises(UserError, match="each once"):
        scaling_laws.run(override(config, ["depths=1,1"]), runtime)


# Series of budgets


def test_budget_series_spends_budgets_and_skips_finished_runs(
    base: Path, trained: list[tuple[str, bool, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = distributed.init("cpu", "float32")
    config = tiny(
        scaling_laws.config(), base, "name=laws", "depths=1,2,3", "budgets=6e8,1.2e9", "base.eval.every_steps=none"
    )
    scaling_laws.run(config, runtime)
    folder = base / "scaling_laws" / "laws"
    rows = results(folder)
    cells = [(float(row["flops_budget"]), int(row["depth"])) for row in rows]
    assert cells == list(itertools.product((6e8, 1.2e9), (1, 2, 3)))
    for row in rows:
        step = float(row["flops"]) / int(row["steps"])
        assert abs(float(row["flops"]) - float(row["flops_budget"])) <= step / 2 + 1, "to the nearest step"
    assert ET.parse(folder / "isoflop.svg").getroot().tag.endswith("svg")
    out = capsys.readouterr().out
    assert "flops_budget" in out and ("best N" in out or "no optimum" in out)
    scaling_laws.run(config, runtime)
    assert len(trained) == 6, "finished runs are skipped"
    scaling_laws.run(override(config, ["budgets=6e8,1.2e9,4e8", "depths=2"]), runtime)
    assert trained[6:] == [("laws_4e8_d2", False, False)], "a larger sweep keeps finished runs"


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
        assert np.polyval(optimum.curve, math.log(optimum.params)) == pytest.approx(optimum.bpb, abs=1e-6)
    text = scaling_laws.laws(scaling_laws.optima(rows))
    # a = 0.28 / 0.62 = 0.4516, b = 0.34 / 0.62 = 0.5484
    assert "N ~ C^0.452, D ~ C^0.548, from 3 budgets" in text


def test_optimum_outside_trained_depths_is_ignored() -> None:
    def row(budget: float, params: float, bpb: float) -> dict[str, float]:
        return {"flops_budget": budget, "params_scaling": params, "tokens": budget / params, "val_bpb": bpb}

    falling = [row(1.0, n, bpb) for n, bpb in ((10.0, 1.3), (20.0, 1.1), (40.0, 1.0))]
    (optimum,) = scaling_laws.optima(falling)
    assert (
        not optimum.inside
        and "not used" in scaling_laws.laws([optimum])
        and "no exponents" in scaling_laws.laws([optimum])
    )
    arched = [row(2.0, n, bpb) for n, bpb in ((10.0, 1.0), (20.0, 1.2), (40.0, 1.0))]
    assert scaling_laws.optima(arched) == [] and "no optimum" in scaling_laws.laws([])
    assert scaling_laws.optima(falling[:2]) == []


def test_num_iterations_and_invalid_budgets_raise(base: Path) -> None:
    runtime = distributed.init("cpu", "float32")
    with pytest.raises(UserError, match="num_iterations"):
        scaling_laws.run(override(scaling_laws.config(), ["base.num_iterations=3"]), runtime)
    with pytest.raises(UserError, match="budgets=1,0"):
        scaling_laws.run(override(scaling_laws.config(), ["budgets=1,0"]), runtime)


def test_depth_series_on_two_ranks_matches_single_process(base: Path) -> None:
    settings = [f"--set=base.{setting}" for setting in (*TINY, f"data.source={base / 'text'}", "num_iterations=3")]
    table = {}
    for count in (1, 2):
        arguments = [f"--set=name=on{count}", "--set=depths=1", "--set=device=cpu", *settings]
        if count == 1:
            scaling_laws.run(
                override(series_of_depths(), [w.removeprefix("--set=") for w in arguments]), distributed.init("cpu")
            )
        else:
            outs = gloo.launch(2, "--experiment=scaling_laws", "--set=series=depths", *arguments)
            assert "results and plots" in outs[0] and not outs[1]
        (table[count],) = results(base / "miniseries" / f"on{count}")
    same = [name for name in scaling_laws.COLUMNS if name not in ("run", "val_bpb", "train_seconds")]
    assert [table[1][name] for name in same] == [table[2][name] for name in same]
    assert float(table[1]["val_bpb"]) == pytest.approx(float(table[2]["val_bpb"]), rel=1e-5)
