"""Sweeps: members equal their own runs, resume, ranks, divergence, what `vary` takes, and members as runs."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny_run

from experiments import _sweep, pretrain, sweep
from nanochat import checkpoint, distributed, train
from nanochat.config import UserError, base_dir, override
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


def test_two_ranks_give_the_numbers_of_one_and_one_resumes_them(unbroken: Path):
    settings = ("name=s", "optim.warmup_steps=2", "num_iterations=4", f"vary={VARY}", "keep=none")
    settings = tiny_run.settings(*settings, "checkpoint.every_steps=2", f"tokenizer={base_dir() / 'tokenizer'}")
    arguments = ["--experiment=sweep", *(f"--set={x}" for x in settings)]
    text = ranks.launch(2, *arguments, "--set=name=ranks", env={"NANOCHAT_BASE_DIR": str(base_dir())})[0]
    assert "2 on each" in text
    folder = base_dir() / "runs" / "ranks"
    assert metrics(folder) == metrics(unbroken)
    assert final_state(folder) == final_state(unbroken)
    # As if it had been killed after step 2; on one rank this time.
    (path,) = (folder / "rounds" / "1" / "checkpoints").glob("4")
    shutil.rmtree(path)
    assert final_state(folder) != final_state(unbroken)
    run("name=ranks", "resume=true")
    assert metrics(folder) == metrics(unbroken)
    assert final_state(folder) == final_state(unbroken)


def test_member_that_diverges_is_frozen_marked_and_ranked_last(capsys: pytest.CaptureFixture[str]):
    folder = run("name=wild", "vary=optim.matrix_lr=0.01,1e30 seed=1..2", "keep=best", "num_iterations=3")
    text = capsys.readouterr().out
    assert text.count("diverged and is frozen") == 2
    assert "best: optim.matrix_lr=0.01:" in text
    wild, calm = (logger.read(folder / "members" / name) for name in ("04", "01"))
    assert wild[-1]["train/diverged"] == 1 and wild[-1]["step"] < calm[-1]["step"] == 3
    assert not any("val/bpb" in row and row["step"] == 3 for row in wild)
    rows = (folder / "members.csv").read_text().splitlines()
    assert rows[-1].split(",")[3] == "-" and rows[-1].split(",")[-1] == str(wild[-1]["step"])
    best = rows[1].split(",")[0]
    assert checkpoint.load(f"wild_{best}").step == 3


def test_shapes_vary_in_rounds_and_a_finished_sweep_writes_other_members(capsys: pytest.CaptureFixture[str]):
    vary = "vary=depth=1,2 seed=1..3"
    folder = run("name=shapes", vary, "num_iterations=2", "members_per_device=2", "chunk_size=1")
    rounds = json.loads((folder / "sweep.json").read_text())["rounds"]
    assert [r["members"] for r in rounds] == [["01", "02"], ["03"], ["04", "05"], ["06"]]
    assert (folder / "sweep.svg").stat().st_size < 60_000
    run("name=shapes", vary, "num_iterations=2", "members_per_device=2", "chunk_size=1", "keep=03,06", "resume=true")
    assert [checkpoint.load(f"shapes_{name}").config.n_layer for name in ("03", "06")] == [1, 2]
    for more, error in ((("resume=true", "vary=seed=1,2"), "has other members"), ((vary,), "--resume continues it")):
        with pytest.raises(UserError, match=error):
            run("name=shapes", *more)


def values(vary: str) -> list[dict[str, Any]]:
    return [dict(m.values) for m in _sweep.make_members(vary, pretrain.Config(name="s"))]


def test_vary():
    assert values("optim.matrix_lr=0.01,2e-2,0.01 seed=1..2,7") == [
        {"optim.matrix_lr": lr, "seed": seed} for lr in (0.01, 0.02) for seed in (1, 2, 7)
    ]
    drawn = values("random:40 optim.matrix_lr=0.001..0.1 optim.warmup_steps=10..1000 seed=1..3 depth=2,4")
    assert drawn == values("random:40 optim.matrix_lr=0.001..0.1 optim.warmup_steps=10..1000 seed=1..3 depth=2,4")
    assert len({str(x) for x in drawn}) == 40
    lrs = sorted(x["optim.matrix_lr"] for x in drawn)
    assert lrs[0] >= 0.001 and lrs[-1] <= 0.1 and 0.005 < lrs[20] < 0.02, "uniform in log space"
    assert all(isinstance(x["optim.warmup_steps"], int) for x in drawn) and {x["depth"] for x in drawn} == {2, 4}
    member = _sweep.make_members("optim.weight_decay=0,0.5 data.seed=3", pretrain.Config(name="s"))[1]
    assert (member.config.optim.weight_decay, member.config.data.seed, member.config.name) == (0.5, 3, "s_02")


@pytest.mark.parametrize(
    "vary, error",
    [
        ("optim.matrx_lr=1", "cannot vary; did you mean optim.matrix_lr.*within a step seed, data.seed"),
        ("compile=true,false", "compile=true,false: cannot vary. These can: .*in rounds.*depth"),
        ("optim.matrix_lr", "expected setting=value,value. These can: within a step seed"),
        ("seed=1 seed=2", "is there twice"),
        ("", "expected 1 to 4096 members"),
        ("random:0 seed=1..9", "expected 1 to 4096 members"),
        ("seed=1..70 data.seed=1..70", "expected 1 to 4096 members"),
        ("seed=1..99999999999", "a grid needs a list"),
        ("optim.matrix_lr=0.1..0.2", "a grid needs a list, optim.matrix_lr=a,b,c"),
        ("seed=5..1", "expected low..high"),
        ("random:3 optim.matrix_lr=0..1", "log space"),
        ("random:9 seed=1..3", "only 3 different members"),
        ("optim.matrix_lr=fast", "expected a number"),
        ("optim.matrix_lr=-1", "at least 0"),
        ("depth=0", "at least 1"),
    ],
)  # fmt: skip
def test_wrong_vary_says_what_can_vary(vary: str, error: str):
    with pytest.raises(UserError, match=error):
        values(vary)


@pytest.mark.parametrize(
    "settings, error",
    [
        (["keep=09"], "keep=09: no such member; set best, or 01 … 04"),
        (["device_batch_size=auto"], "a number as device_batch_size"),
        (["init_from=x"], "no init_from"),
        (["train.linear=fp8"], "train.linear=dense"),
        (["model.vocab_size=7"], "the tokenizer has"),
        (["device_batch_size=3"], "device_batch_size=3: does not divide"),
    ],
)
def test_refusals_come_before_any_file(corpus: Path, settings: list[str], error: str):
    with pytest.raises(UserError, match=error):
        run("name=refused", *settings)
    assert not (corpus / "runs" / "refused" / "sweep.json").exists()


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]):
    run("name=dry", "dry_run=true")
    text = capsys.readouterr().out
    assert "sweep over 4 members" in text and "GiB" in text and "4 steps of 256 tokens" in text
    assert not (base_dir() / "runs" / "dry").exists()


def test_conclusion_says_how_sure_it_is():
    members = _sweep.make_members("optim.matrix_lr=0.1,0.2,0.3 seed=1..2", pretrain.Config(name="s"))
    sizes = np.full(40, 100.0)
    rng = np.random.default_rng(0)
    text = rng.normal(70, 5, 40)  # hard and easy rows, the same for all

    def say(*shifts: float) -> list[str]:
        nats = [np.stack([text + 100 * shift, sizes], axis=1) for shift in shifts]
        bpb = [float(x[:, 0].sum() / sizes.sum() / np.log(2)) for x in nats]
        results = [_sweep.Result(m, x, 1.0, None) for m, x in zip(members, bpb)]
        return list(_sweep.conclusion(results, {m.name: x for m, x in zip(members, nats)}))

    clear, unclear = say(0.3, 0.301, 0.1, 0.101, 0.2, 0.201), say(0.3, 0.4, 0.1, 0.2, 0.11, 0.19)
    assert clear[0].startswith("best: optim.matrix_lr=0.2:") and "mean of 2 seeds" in clear[0]
    assert clear[1].startswith("second: optim.matrix_lr=0.3: +0.1443") and clear[1].endswith("; significant)")
    assert "not significant" in unclear[1]
