"""Pretraining on several ranks with torchrun: the same losses as one process, and recovery from lost ranks."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks

from nanochat import checkpoint
from nanochat.data import tokenizer
from nanochat.metrics import logger

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "depth=2",
    "name=tiny",
    "compile=false",
    "device=cpu",
    "model.sequence_len=32",
    "model.aspect_ratio=32",
    "model.head_dim=32",
    "model.window_pattern=L",
    "device_batch_size=2",
    "total_batch_size=256",
    "num_iterations=6",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=none",
    "eval.every_steps=3",
    "eval.tokens=512",
    "eval.sample_tokens=4",
    "eval.prompts=the cat",
    "metrics.every_steps=1",
    "data.buffer_docs=20",
    "optim.warmup_steps=100",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    words = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "then", "quick", "lazy", "over"]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) + "." for _ in range(400)]
    (folder / "text").mkdir()
    for name, part in {"a": texts[:180], "b": texts[180:360], "val": texts[360:]}.items():
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    tokenizer.save(tokenizer.train(texts, 300), folder / "tokenizer")
    return folder


def arguments(data: Path, *more: str) -> list[str]:
    """Return command-line arguments from settings, and options with their dashes."""
    given = (*SETTINGS, f"data.source={data / 'text'}", f"tokenizer={data / 'tokenizer'}", *more)
    return ["--experiment=pretrain", *(x if x.startswith("--") else f"--set={x}" for x in given)]


def run(data: Path, base: Path, count: int, *more: str) -> str:
    """Run a job of `count` ranks, and return their output."""
    return "".join(ranks.launch(count, *arguments(data, *more), env={"NANOCHAT_BASE_DIR": str(base)}))


def start(data: Path, base: Path, *more: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a job of two ranks with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    command += ["launch.py", *arguments(data, *more)]
    env = os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def fail(*args: Any, **options: Any) -> str:
    """Return the output of a failing torchrun job."""
    process = start(*args, **options)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    return output


def curve(base: Path) -> dict[int, float]:
    steps, losses = logger.curve(logger.read(base / "runs" / "tiny"), "train/loss")
    return {int(step): loss for step, loss in zip(steps, losses)}


def bits(base: Path) -> list[float]:
    return logger.curve(logger.read(base / "runs" / "tiny"), "val/bpb")[1]


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base folder of a single-process run."""
    base = tmp_path_factory.mktemp("single")
    run(data, base, 1)
    return base


def test_two_ranks_match_single_process(data: Path, tmp_path: Path, single: Path) -> None:
    output = run(data, tmp_path, 2, "sharding.mode=fsdp")
    assert re.search(r"sharding +fsdp on 1 x 2 ranks", output)
    assert output.count("done 6 of 6 steps") == 1  # printed by rank 0 only
    assert curve(tmp_path) == pytest.approx(curve(single), rel=1e-5)
    assert bits(tmp_path) == pytest.approx(bits(single), rel=1e-5)


def test_resume_with_other_world_size_and_mode(data: Path, tmp_path: Path, single: Path) -> None:
    run(data, tmp_path, 2, "sharding.mode=zero2")
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    for step in checkpoint.steps(folder)[1:]:
        shutil.rmtree(folder / str(step))
    output = run(data, tmp_path, 4, "--resume", "sharding.mode=hsdp", "sharding.shard_ranks=2", "device_batch_size=1")
    assert "resumed from step 2" in output
    assert curve(tmp_path) == pytest.approx(curve(single), rel=1e-5)
    assert bits(tmp_path) == pytest.approx(bits(single), rel=1e-5)


def test_preempted_job_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    settings = ("num_iterations=40", "sharding.mode=fsdp", "eval.every_steps=none")
    run(data, tmp_path / "unbroken", 2, *settings)
    folder = tmp_path / "broken" / "runs" / "tiny" / "checkpoints"
    with ranks.start_launch(2, *arguments(data, *settings), env={"NANOCHAT_BASE_DIR": str(tmp_path / "broken")}) as job:
        job.until(lambda: checkpoint.steps(folder))
        job.send_signal(signal.SIGTERM)  # as a scheduler does
        output = job.wait()[0].out
    stopped = checkpoint.latest_step(folder)
    assert stopped is not None and stopped < 40, output
    assert f"stopped by SIGTERM; step {stopped} is saved" in output
    run(data, tmp_path / "broken", 2, *settings, "--resume")
    assert curve(tmp_path / "broken") == curve(tmp_path / "unbroken")
    assert bits(tmp_path / "broken") == bits(tmp_path / "unbroken")


def test_killed_rank_restarts_job_from_last_checkpoint(data: Path, tmp_path: Path) -> None:
    options = ("--max-restarts=1",)
    process = start(data, tmp_path, "num_iterations=60", "optim.warmup_steps=1000", options=options)
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    wait_until(lambda: len(checkpoint.steps(folder)) > 1, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "restart 1 by torchrun: resuming from the last checkpoint" in output
    assert int(re.findall(r"resumed from step (\d+)", output)[0]) >= 3
    assert sorted(curve(tmp_path)) == list(range(1, 61))  # every step once
    assert "done 60 of 60 steps" in output


def test_restart_does_not_modify_run_of_another_job(data: Path, tmp_path: Path, single: Path) -> None:
    shutil.copytree(single, tmp_path, dirs_exist_ok=True)
    before = curve(tmp_path)
    output = fail(data, tmp_path, "num_iterations=8", options=("--max-restarts=1",))
    assert len(re.findall("^error: run .* has checkpoints up to step 6: --resume", output, re.MULTILINE)) == 2
    assert curve(tmp_path) == before and checkpoint.latest_step(tmp_path / "runs" / "tiny" / "checkpoints") == 6


def test_torch_func_needs_a_single_process(data: Path, tmp_path: Path) -> None:
    with ranks.start_launch(
        2, *arguments(data, "train.grad=torch_func"), env={"NANOCHAT_BASE_DIR": str(tmp_path)}
    ) as job:
        finished = job.wait()
    assert [rank.code for rank in finished] == [1, 1]
    assert all(rank.err.startswith("error: train.grad=torch_func runs in one process") for rank in finished), finished


def wait_until(done: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
