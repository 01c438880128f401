"""Pretraining on several ranks with torchrun: the same losses as one process, and recovery from lost ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import recorded_steps
import tiny_run

from experiments import _replay
from nanochat import checkpoint
from nanochat.config import base_dir
from nanochat.metrics import logger

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("corpus")]

ROOT = Path(__file__).resolve().parents[2]
TINY = ("device_batch_size=2", "checkpoint.every_steps=2", "checkpoint.keep_last=none", "eval.tokens=512")
TINY += ("optim.warmup_steps=100",)


def arguments(*more: str) -> list[str]:
    """Return command-line arguments from settings, and options with their dashes."""
    given = (*tiny_run.settings(*TINY), f"tokenizer={base_dir() / 'tokenizer'}", *more)
    return ["--experiment=pretrain", *(x if x.startswith("--") else f"--set={x}" for x in given)]


def run(base: Path, count: int, *more: str) -> str:
    return "".join(ranks.launch(count, *arguments(*more), env={"NANOCHAT_BASE_DIR": str(base)}))


def start(base: Path, *more: str) -> subprocess.Popen[str]:
    """Start a job of two ranks with torchrun, which restarts it once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += ["launch.py", *arguments(*more)]
    env = os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def checkpoints(base: Path) -> Path:
    return base / "runs" / "tiny" / "checkpoints"


def curve(base: Path, name: str = "train/loss") -> dict[float, float]:
    return dict(zip(*logger.curve(logger.read(base / "runs" / "tiny"), name)))


def assert_same_curves(base: Path, other: Path, rel: float) -> None:
    for name in ("train/loss", "val/bpb"):
        assert curve(base, name) == pytest.approx(curve(other, name), rel=rel, abs=0.0)


@pytest.fixture(scope="module")
def single(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base folder of a single-process run."""
    base = tmp_path_factory.mktemp("single")
    run(base, 1)
    return base


def test_two_ranks_match_single_process(tmp_path: Path, single: Path) -> None:
    output = run(tmp_path, 2, "sharding.mode=fsdp")
    assert re.search(r"sharding +fsdp on 1 x 2 ranks", output)
    assert output.count("done 6 of 6 steps") == 1  # printed by rank 0 only
    assert_same_curves(tmp_path, single, 1e-5)


def test_batches_of_all_steps_are_read_again_in_one_process(tmp_path: Path) -> None:
    """Of steps on one rank, and of the run resumed on two."""
    env = {"NANOCHAT_BASE_DIR": str(tmp_path)}
    [first] = ranks.call(1, recorded_steps.launch_recorded, *arguments("checkpoint.every_steps=4"), env=env)
    more = ("num_iterations=9", "device_batch_size=1", "--resume")
    parts = ranks.call(2, recorded_steps.launch_recorded, *arguments("checkpoint.every_steps=4", *more), env=env)
    second = [[row for pair in zip(*rows, strict=True) for row in pair] for rows in zip(*parts, strict=True)]
    assert (len(first), len(second)) == (6, 3)
    for number, rows in enumerate([*first, *second]):
        assert next(_replay.steps_after(tmp_path / "runs" / "tiny", number)).batch["inputs"].tolist() == rows


def test_resume_with_other_world_size_and_mode(tmp_path: Path, single: Path) -> None:
    run(tmp_path, 2, "sharding.mode=zero2")
    for step in checkpoint.steps(checkpoints(tmp_path))[1:]:
        shutil.rmtree(checkpoints(tmp_path) / str(step))
    output = run(tmp_path, 4, "--resume", "sharding.mode=hsdp", "sharding.shard_ranks=2", "device_batch_size=1")
    assert "resumed from step 2" in output
    assert_same_curves(tmp_path, single, 1e-5)


def test_preempted_job_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = ("num_iterations=40", "sharding.mode=fsdp", "eval.every_steps=none", "checkpoint.every_steps=5")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run(unbroken, 2, *settings)
    with ranks.start_launch(2, *arguments(*settings), env={"NANOCHAT_BASE_DIR": str(broken)}) as job:
        job.until(lambda: checkpoint.steps(checkpoints(broken)))
        job.send_signal(signal.SIGTERM)  # as a scheduler does
        finished = job.wait()
    output = finished[0].out
    assert [rank.code for rank in finished] == [128 + signal.SIGTERM] * 2, output
    stopped = checkpoint.latest_step(checkpoints(broken))
    assert stopped is not None and stopped < 40, output
    assert f"stopped by SIGTERM; step {stopped} is saved" in output
    run(broken, 2, *settings, "--resume")
    assert_same_curves(broken, unbroken, 0.0)


def test_killed_rank_restarts_job_from_last_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path, "num_iterations=60", "optim.warmup_steps=1000", "eval.every_steps=none")
    end = time.monotonic() + 300
    while len(checkpoint.steps(checkpoints(tmp_path))) < 2:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "restart 1 by torchrun: resuming from the last checkpoint" in output
    assert int(re.findall(r"resumed from step (\d+)", output)[0]) >= 3
    assert sorted(curve(tmp_path)) == list(range(1, 61))  # every step once
    assert "done 60 of 60 steps" in output


def test_restart_does_not_modify_run_of_another_job(tmp_path: Path, single: Path) -> None:
    shutil.copytree(single, tmp_path, dirs_exist_ok=True)
    before = curve(tmp_path)
    env = {"NANOCHAT_BASE_DIR": str(tmp_path), "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "1"}
    with ranks.start_launch(2, *arguments("num_iterations=8"), env=env) as job:
        finished = job.wait()
    assert [rank.code for rank in finished] == [1, 1], finished
    assert re.search("^error: run .* has checkpoints up to step 6: --resume", finished[0].err, re.MULTILINE), finished
    assert curve(tmp_path) == before and checkpoint.latest_step(checkpoints(tmp_path)) == 6
