"""Checkpoints of several processes: every job reads every other's, and a kill hurts no finished step."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_checkpoint
import torch
from ranks_checkpoint import KILL_WIDTH, assert_same, whole_state

from nanochat import checkpoint, distributed, tree
from nanochat.checkpoint import CorruptCheckpointError, integrity, storage
from nanochat.checkpoint.integrity import fingerprint
from nanochat.config import UserError

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_ranks(check: str, size: int, folder: Path) -> None:
    """Run a function of tests/ranks_checkpoint.py on so many ranks."""
    command = [sys.executable, "-m", "tests.helpers.ranks_checkpoint", check, str(size), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 3, saved by each of JOBS into a folder of its name."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks("save_on_every_job", 4, folder)
    return folder


def test_any_job_loads_what_any_job_saved(saved: Path) -> None:
    run_ranks("load_on_every_job", 4, saved)


def test_every_part_is_written_once_and_by_turns(saved: Path) -> None:
    whole_bytes = tree.nbytes(tuple(tree.flatten(whole_state(3)._asdict()).values()))
    for size, mode in ranks_checkpoint.JOBS:
        state = saved / f"{size}-{mode}" / "3" / "state"
        parts = sorted(path.name for path in state.glob("ocdbt.process_*"))
        assert parts == [f"ocdbt.process_{rank}" for rank in range(size)]
        written = {part: sum(p.stat().st_size for p in (state / part).rglob("*") if p.is_file()) for part in parts}
        overhead = 2500 * size + 4000  # the index: small leaves lie in it
        assert whole_bytes <= sum(written.values()) + overhead, (mode, written)
        stored = b"".join(p.read_bytes() for part in parts for p in (state / part).rglob("d/*"))
        wte = whole_state(3).params["wte"]
        for row in range(0, 64, 16):
            assert stored.count(ranks_checkpoint.raw(wte[row : row + 16])) == 1, (size, mode)


def test_one_process_without_a_group_reads_all(saved: Path) -> None:
    for size, mode in ranks_checkpoint.JOBS:
        got, meta, _ = checkpoint.restore(saved / f"{size}-{mode}", whole_state(0))
        assert_same(got, whole_state(3))
        assert meta == {"seed": 1, "rank": 0}


def test_a_program_of_jax_alone_reads_it(saved: Path) -> None:
    np.save(saved / "wte.npy", whole_state(3).params["wte"].numpy())
    np.save(saved / "q.npy", whole_state(3).params["h", "0", "q"].view(torch.int16).numpy())
    program = f"""
        import sys
        import jax, numpy as np, orbax.checkpoint as ocp
        from jax.sharding import NamedSharding, PartitionSpec
        mesh = jax.make_mesh((4,), ("x",))
        cut = NamedSharding(mesh, PartitionSpec("x"))
        reader = ocp.CheckpointManager({str(saved / "4-fsdp")!r}, item_names=("state", "meta"))
        params = {{"wte": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=cut),
                   "h": {{"0": {{"q": jax.ShapeDtypeStruct((12, 40), jax.numpy.bfloat16, sharding=cut)}}}}}}
        want = {{"params": params}}
        how = ocp.checkpoint_utils.construct_restore_args(want)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(want, restore_args=how, partial_restore=True), meta=ocp.args.JsonRestore()
        )
        got = reader.restore(reader.latest_step(), args=items)
        wte, q = got.state["params"]["wte"], got.state["params"]["h"]["0"]["q"]
        assert isinstance(wte, jax.Array) and len(wte.addressable_shards) == 4 and wte.sharding == cut
        np.testing.assert_array_equal(wte, np.load({str(saved / "wte.npy")!r}))
        np.testing.assert_array_equal(np.asarray(q).view(np.int16), np.load({str(saved / "q.npy")!r}))
        whole = ocp.PyTreeCheckpointer().restore({str(saved / "4-hsdp" / "3" / "state")!r})
        np.testing.assert_array_equal(whole["opt_state"]["big"], np.arange(8) * 2**59 + 2)
        assert whole["opt_state"]["big"].dtype == np.int64 and whole["step"] == 3
        assert not {{"torch", "nanochat"}} & set(sys.modules)
    """
    env = {**ENV, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=env, cwd=saved, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_what_fails_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_ranks("fail_alike", 4, tmp_path)


def test_a_rank_that_ends_alone_holds_nobody_up(tmp_path: Path) -> None:
    run_ranks("lose_a_rank", 4, tmp_path)
    assert_same(checkpoint.restore(tmp_path / "run", whole_state(1, 4096))[0], whole_state(1, 4096))


JOBS = [(4, "fsdp"), (2, "fsdp"), (4, "hsdp"), (4, "replicate"), (1, "plain")]


@pytest.mark.parametrize("everybody", [False, True])
def test_a_save_killed_at_ten_moments_never_hurts(tmp_path: Path, everybody: bool) -> None:
    forker = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.ranks_checkpoint", "kill_ranks", "1", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=ENV,
    )
    assert forker.stdin and forker.stdout

    def run(step: int, job: tuple[int, str], victim: int, phase: int, delay: float) -> dict[str, Any]:
        assert forker.stdin and forker.stdout
        print(step, *job, victim, phase, delay, file=forker.stdin, flush=True)
        return json.loads(forker.stdout.readline())

    def check(allowed: set[int]) -> int:
        there = checkpoint.steps(tmp_path / "run")
        assert there and there[-1] in allowed
        for step in there:
            want = whole_state(step, KILL_WIDTH)
            assert_same(checkpoint.restore(tmp_path / "run", want, step=step)[0], want)
        return there[-1]

    assert run(1, JOBS[0], 0, 0, -1)["codes"] == [0] * 4
    lived = run(2, JOBS[0], 0, 0, -1)
    assert lived["codes"] == [0] * 4 and check({2}) == 2
    blocking_seconds, background_seconds = map(float, lived["took"])
    moments = [(0, blocking_seconds * i / 4) for i in range(4)] + [(1, background_seconds * i / 6) for i in range(6)]
    latest, interrupted, outlived = 2, 0, 0
    for number, (phase, delay) in enumerate(moments):
        size, mode = JOBS[number % len(JOBS)] if everybody else JOBS[number % 4]
        victim = -1 if everybody else number % size
        codes = run(latest + 1, (size, mode), victim, phase, delay)["codes"]
        # Who is not killed ends by itself: done, or with the error that another one is lost.
        assert set(codes) <= ({0, -9} if everybody else {0, 3, -9}), codes
        outlived += 3 in codes
        interrupted += any("tmp" in path.name for path in (tmp_path / "run").iterdir())
        latest = check({latest, latest + 1})
    assert interrupted, f"no kill fell into the {background_seconds:.2f} s of writing"
    assert everybody or outlived, "no rank met the loss of another"
    assert run(latest + 1, (2, "fsdp"), 0, 0, -1)["codes"] == [0] * 2  # goes on, on another number of ranks
    assert check({latest + 1}) == latest + 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [str(latest + 1)]
    forker.stdin.close()
    assert forker.wait(30) == 0


def test_torchrun_starts_again_from_the_last_good_step(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    begun = time.monotonic()
    done = subprocess.run(
        [*torchrun, "-m", "tests.helpers.ranks_checkpoint", "under_torchrun", "2", str(tmp_path)],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 60
    assert done.stdout.count("done") == 2
    assert checkpoint.steps(tmp_path / "run") == [1, 2]
    assert_same(checkpoint.restore(tmp_path / "run", whole_state(2))[0], whole_state(2))


# The pieces, in one process


def test_together_is_transparent_in_one_process() -> None:
    line = distributed.create_group()
    assert (
        line == distributed.ControlGroup()
        and distributed.all_gather_object(line, {"a": 1}) == [{"a": 1}]
        and distributed.broadcast_object(line, 2) == 2
    )
    with pytest.raises(ZeroDivisionError), distributed.raise_on_any_failure(line):
        _ = 1 / 0


def test_fingerprints_from_parts_count_copies_once() -> None:
    x = torch.arange(24, dtype=torch.float32).view(6, 4)
    parts = [fingerprint(x[:3]), fingerprint(x[3:], [3, 0])]
    signed = [value - 2**64 if value >= 2**63 else value for value in parts]
    found = torch.tensor([[[number, signed[number]]] for number in (0, 1, 0, 1)])
    assert integrity.full_fingerprints(found, ["x"]) == {"x": f"{fingerprint(x):016x}"}
    assert [integrity.shards_to_write(found, rank) for rank in range(4)] == [[True], [True], [False], [False]]
    found[2, 0, 1] += 1
    with pytest.raises(UserError, match="x differs between rank 0 and rank 2"):
        integrity.full_fingerprints(found, ["x"])


@pytest.mark.parametrize(
    ("sizes", "limit", "pieces"),
    [((), 8, []), ((8, 6), 96, [4, 6]), ((8, 6), 20, [1, 3]), ((3, 4), 16, [3, 1]), ((2, 2), 16, [2, 2])],
)
def test_pieces_divide_a_block(sizes: tuple[int, ...], limit: int, pieces: list[int]) -> None:
    assert integrity.chunk_shape(sizes, 4, limit) == pieces


def test_pieces_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = integrity.chunk_shape
    monkeypatch.setattr(integrity, "chunk_shape", lambda sizes, itemsize: chunk(sizes, itemsize, 64))
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, whole_state(1), {})
    assert_same(checkpoint.restore(manager, whole_state(1))[0], whole_state(1))
    checkpoint.close(manager)
    wte = whole_state(1).params["wte"]
    got = storage.read_blocks(tmp_path / "1" / "state", {"params.wte": ((64, 64), (slice(3, 9), slice(1, 8)))})
    assert np.array_equal(got["params.wte"], wte[3:9, 1:8].numpy())
    assert storage.read_blocks(tmp_path / "1" / "state", {"params.wte": ((63, 64), (slice(3), slice(8)))}) == {}


def test_an_absent_part_is_noticed(saved: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(saved / "4-fsdp"), str(tmp_path / "run")], check=True)
    for path in (tmp_path / "run" / "3" / "state" / "ocdbt.process_2" / "d").iterdir():
        path.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"run/3: .*state cannot be read"):
        checkpoint.load_params(tmp_path / "run")
