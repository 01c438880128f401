"""--experiment=curvature at the checkpoints of a tiny run."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from experiments import _replay, curvature
from nanochat import checkpoint, distributed, model, train, tree
from nanochat.config import UserError, override

FEW = ("device=cpu", "tokens=256", "iterations=6", "samples=2", "eigenvalues=2", "device_batch_size=8")


@pytest.fixture(scope="module")
def folder(corpus: Path) -> Path:
    return tiny_run.pretrain_run(
        "checkpoint.keep_last=none", "checkpoint.every_steps=1", "num_iterations=4", "eval.every_steps=9"
    )


def run(*settings: str) -> None:
    curvature.run(override(curvature.Config(), [*FEW, *settings]), distributed.init("cpu"))


@pytest.mark.slow
def test_numbers_and_charts_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    run("run=tiny@3")
    assert "curvature of tiny at 1 checkpoint: at most 16 Hessian products, 256 tokens each" in capsys.readouterr().out
    results: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "curvature" / "curvature.jsonl").read_text().splitlines()
    ]
    assert [result["step"] for result in results] == [3]
    for name in ("along_eigenvector", "along_update", "by_step"):
        assert (folder / "curvature" / f"{name}.svg").stat().st_size > 1000
    for result in results:
        assert result["by_finite_differences"] == pytest.approx(result["eigenvalues"][0], rel=0.03)
        assert result["sharpness"] > 0 and result["trace_error"] > 0 and result["smallest"] < result["eigenvalues"][1]
        batch = next(_replay.steps_after(folder, result["step"])).batch
        # All tokens of the step: the curve begins at this checkpoint, and one update later is the next one.
        curve = dict(zip(result["along update"]["at"], result["along update"]["loss"]))
        for at, step in ((0.0, 0), (1.0, 1)):
            params = checkpoint.load(folder, step=result["step"] + step, device="cpu").params
            loss = float(model.loss.next_token(params, batch)[0])
            assert curve[min(curve, key=lambda x: abs(x - at))] == pytest.approx(loss, abs=1e-5)


@pytest.mark.slow
def test_what_has_no_curvature_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no checkpoint of step 9"):
        run("run=tiny", "steps=2,9")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "free_bytes", lambda *_: 2**20)
        with pytest.raises(UserError, match=r"takes \d+\.\d GiB: .* parameters, 6 vectors .* 0\.0 GiB are free"):
            run("run=tiny", "steps=2")
    init_state_from = train.init_state_from

    def broken(*args: Any) -> train.TrainState:
        state = init_state_from(*args)
        return state._replace(params=tree.map(lambda x: x * torch.nan, state.params))

    monkeypatch.setattr(train, "init_state_from", broken)
    with pytest.raises(UserError, match="step 2 of tiny: loss nan, gradient norm nan: no curvature to measure"):
        run("run=tiny", "steps=2")
