"""Tiny RL end to end: recorded run and metrics, bit-exact resume, the same on two ranks."""

import itertools
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import rl_ranks
import tiny_run
import torch

from experiments import rl as experiment
from nanochat import checkpoint, distributed, text, train, tree
from nanochat.checkpoint import manager
from nanochat.config import UserError, override
from nanochat.metrics import logger
from nanochat.train import rl, stage

SETTINGS = (
    "run=tuned", "task=arithmetic:size=64", "eval_task=arithmetic:size=6", "num_iterations=5", "device_batch_size=3",
    "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.max_tokens=8", "rollout.slots=16",
    "optim.lr_fraction=0.2",
    "eval.every_steps=3", "eval.problems=3", "eval.sample_every_steps=4", "checkpoint.every_steps=2",
    "metrics.every_steps=1", "compile=false", "device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with a random fine-tuned model, and rewards that such a model can get."""
    folder = tmp_path_factory.mktemp("base")
    tiny_run.save_run(folder, "tuned", stage="sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setattr(rl, "correct_reward", rl_ranks.reward)
        yield folder


def train_rl(*more: str) -> Path:
    config = override(experiment.Config(), [*SETTINGS, *more])
    experiment.run(config, distributed.init("cpu"))
    return train.run_folder(str(config.name))


@pytest.fixture(scope="module")
def uninterrupted(base: Path) -> Path:
    return train_rl("name=uninterrupted")


def test_run_writes_config_metrics_and_checkpoint(base: Path, capsys: pytest.CaptureFixture[str]):
    folder = train_rl("name=seen")
    rows = logger.read(folder)
    steps, rewards = logger.curve(rows, "rl/reward")
    assert steps == [1, 2, 3, 4, 5] and min(rewards) > 0 and len(set(rewards)) > 1
    assert logger.curve(rows, "train/lr_factor")[1] == pytest.approx([0.2 * (1 - i / 5) for i in range(5)])
    assert logger.curve(rows, "train/epoch")[1] == pytest.approx([4 * i / 64 for i in range(1, 6)])
    passed = [logger.curve(rows, f"rl/pass_at_{k}") for k in range(1, 9)]
    assert all(steps == [3, 5] for steps, _ in passed)
    assert all(a <= b for (_, some), (_, more) in itertools.pairwise(passed) for a, b in zip(some, more))
    tokens = [16 * mean for mean in logger.curve(rows, "rl/answer_tokens")[1]]
    assert logger.curve(rows, "train/tokens")[1] == pytest.approx(list(itertools.accumulate(tokens)))
    for name in ("rl/answer_tokens", "rl/finished", "rl/mixed", "perf/rollout_tokens_per_second"):
        assert len(logger.curve(rows, name)[1]) == 5
    for name in ("reward", "length", "pass", "loss"):
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    out = capsys.readouterr().out
    assert f"done 5 of 5 steps, {text.format_count(sum(tokens))} tokens" in out and "bpb.svg" not in out
    for expected in ("step 3: pass @1 ", "mean reward, smoothed", "--experiment=eval_chat --set run=seen"):
        assert expected in out
    looked = out[out.index("step 4: ") :].splitlines()
    assert looked[0].startswith("step 4: '") and looked[1].startswith(("  0", "  1"))
    meta = checkpoint.load_params(folder / "checkpoints")[1]
    assert meta["stage"] == "rl" and meta["parent"] == {"run": "tuned", "step": 1, "stage": "sft"}
    assert meta["loader"] == {"read": 20, "task": "arithmetic", "size": 64}
    loaded, parent = checkpoint.load("seen", device="cpu"), checkpoint.load("tuned", device="cpu")
    assert loaded.stage == "rl" and not torch.equal(loaded.params["lm_head"], parent.params["lm_head"])


def test_zero_learning_rate_freezes_group(base: Path):
    folder = train_rl("name=held", "num_iterations=2", "optim.matrix_lr=0", "optim.embedding_lr=0")
    before = tree.flatten(checkpoint.load("tuned", device="cpu").params)
    after = tree.flatten(checkpoint.load("held", device="cpu").params)
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved == {"lm_head", "resid_lambdas", "x0_lambdas", "backout_lambda", "smear_lambda", "smear_gate"}
    assert logger.curve(logger.read(folder), "train/lr_factor")[1] == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize(("step", "run"), [(1, "run=none"), (4, "run=gone")])
def test_resumed_run_equals_uninterrupted_run(base: Path, uninterrupted: Path, step: int, run: str):
    with tiny_run.stop_after(step):
        train_rl(f"name=stopped{step}")
    tiny_run.assert_same_run(uninterrupted, train_rl(f"name=stopped{step}", "resume=true", run))


@pytest.mark.parametrize("mode", ["zero2", "fsdp"])
@pytest.mark.slow
def test_two_ranks_match_single_process(base: Path, uninterrupted: Path, mode: str):
    arguments = [f"--set={value}" for value in (*SETTINGS, f"name={mode}", f"sharding.mode={mode}")]
    ranks.call(2, rl_ranks.launch_rl, "--experiment=rl", *arguments)
    rows = [logger.read(run) for run in (uninterrupted, base / "runs" / mode)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    # Weights are not compared: AdamW makes a scalar's step of a gradient that is rounding. Answers follow from them.
    for name, rel in {"rl/reward": 1e-9, "rl/answer_tokens": 1e-9, "train/loss": 1e-3, "train/grad_norm": 1e-3}.items():
        single, sharded = (logger.curve(run, name)[1] for run in rows)
        assert sharded == pytest.approx(single, rel=rel) and len(single) == 5, name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.prompts_per_step=65", "arithmetic has 64 rows: too few for a step of 65"),
        ("train.attention=flex", "train.attention=flex: answers have many lengths"),
        ("device_batch_size=0", "device_batch_size=0"),
        ("task=customjson:/nowhere.jsonl", "/nowhere.jsonl"),
    ],
)
def test_invalid_settings_raise_one_line_error(base: Path, setting: str, message: str):
    more = ["num_iterations=none"] if "prompts_per_step" in setting else []
    with pytest.raises(UserError, match=message):
        train_rl("name=wrong", setting, *more)


def test_default_length_is_one_epoch(base: Path):
    config = override(experiment.Config(), [*SETTINGS, "num_iterations=none"])
    task = experiment.tasks.from_text(config.task)
    assert experiment.resolve(config, task, distributed.init("cpu")).num_iterations == 64 // 4


def test_epoch_of_gsm8k_leaves_a_checkpoint_each_60_steps():
    config = experiment.Config()
    saved = [step for step in range(1, 468) if stage.is_due(step, config.checkpoint.every_steps) or step == 467]
    infos = [types.SimpleNamespace(step=step, metrics=None) for step in saved]
    kept = manager._preservation_policy(config.checkpoint).should_preserve(infos, context=None)
    assert [info.step for info, keep in zip(infos, kept) if keep] == [60, 120, 180, 240, 300, 360, 420, 467]
