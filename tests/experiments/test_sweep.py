"""Sweeps: members equal their own runs, resume, ranks, divergence, what `vary` takes, and members as runs."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from experiments import sweep
from nanochat import checkpoint, distributed, train
from nanochat.config import base_dir, override
from nanochat.metrics import logger

pytestmark = pytest.mark.usefixtures("corpus")
VARY = "optim.matrix_lr=0.01,0.04 seed=1..2"


def config(*more: str) -> sweep.Config:
    settings = ("name=s", "optim.warmup_steps=2", "num_iterations=4", f"vary={VARY}", "keep=none")
    return override(sweep.Config(), tiny_run.settings(*settings, "checkpoint.every_steps=2", *more))


def run(*more: str) -> Path:
    settings = config(*more)
    sweep.run(settings, distributed.init("cpu", settings.dtype))
    return train.run_folder(str(settings.name))


def metrics(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the metrics of all members that do not depend on time."""
    members = sorted((folder / "members").iterdir())
    return [
        [{n: x for n, x in row.items() if not n.startswith("perf/")} for row in logger.read(member)]
        for member in members
    ]


def final_state(folder: Path, number: int = 1) -> dict[str, Any]:
    """Return the leaves of a round's last checkpoint as numpy arrays, without knowing the model."""
    path = folder / "rounds" / str(number) / "checkpoints"
    header = checkpoint.manager.integrity.read_header(checkpoint.manager.step_path(path, None))
    return {name: spec["fingerprint"] for name, spec in header["state"].items()}


@pytest.fixture(scope="module")
def unbroken(corpus: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(corpus))
        return run("keep=best,01", "name=unbroken")


def test_members_equal_pretraining_runs_of_their_own(unbroken: Path):
    """Of their seed and learning rate, on the data of the base settings."""
    for number, member in enumerate(metrics(unbroken)):
        lr, seed = ((0.01, 1), (0.01, 2), (0.04, 1), (0.04, 2))[number]
        own = tiny_run.pretrain_run(
            "optim.warmup_steps=2", "num_iterations=4", f"optim.matrix_lr={lr}", f"seed={seed}", "data.seed=42",
            "name=own", "overwrite=true", "eval.prompts=",
        )  # fmt: skip
        rows = logger.read(own)
        for name, atol in (("train/loss", 1e-5), ("val/bpb", 1e-5), ("train/grad_norm", 1e-4)):
            assert logger.curve(member, name)[0] == logger.curve(rows, name)[0]
            np.testing.assert_allclose(logger.curve(member, name)[1], logger.curve(rows, name)[1], rtol=0, atol=atol)


def test_member_is_an_ordinary_run(unbroken: Path):
    own = base_dir() / "runs" / "unbroken_01"
    assert logger.read(own) == logger.read(unbroken / "members" / "01")
    loaded = checkpoint.load("unbroken_01")
    assert (loaded.step, loaded.stage, loaded.config.n_layer) == (4, "base", 2)
    # It can be trained further like one, with its optimizer state and its place in the data.
    tiny_run.pretrain_run(
        "optim.warmup_steps=2", "name=unbroken_01", "optim.matrix_lr=0.01", "seed=1", "data.seed=42",
        "num_iterations=6", "resume=true", "eval.prompts=",
    )  # fmt: skip
    straight = tiny_run.pretrain_run(
        "optim.warmup_steps=2", "name=straight", "optim.matrix_lr=0.01", "seed=1", "data.seed=42",
        "num_iterations=4", "eval.prompts=",
    )  # fmt: skip
    tiny_run.pretrain_run(
        "optim.warmup_steps=2", "name=straight", "optim.matrix_lr=0.01", "seed=1", "data.seed=42",
        "num_iterations=6", "resume=true", "eval.prompts=",
    )  # fmt: skip
    np.testing.assert_allclose(tiny_run.losses(own)[-2:], tiny_run.losses(straight)[-2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("data_seeds", [False, True])
def test_stopped_sweep_resumes_bit_for_bit(unbroken: Path, monkeypatch: pytest.MonkeyPatch, data_seeds: bool):
    vary = [f"vary={VARY} data.seed=7,8"] if data_seeds else []
    reference = run("name=reference", "members_per_device=6", *vary) if data_seeds else unbroken
    name, fit = f"name=stopped{data_seeds}", train.fit

    def stop_once(*args: Any, after_step: Any, **options: Any) -> Any:
        def stop(state: Any, at: Any, numbers: Any) -> Any:
            at = after_step(state, at, numbers)
            if at.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return at

        return fit(*args, after_step=stop, **options)

    more = ["members_per_device=6"] * data_seeds
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", stop_once)
        with pytest.raises(SystemExit):
            run(name, *more, *vary)
    folder = run(name, *more, *vary, "resume=true")
    assert metrics(folder) == metrics(reference)
    assert final_state(folder) == final_state(reference)
    assert (folder / "members.csv").read_text() == (reference / "members.csv").read_text()
