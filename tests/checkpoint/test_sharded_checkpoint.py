"""Checkpoints of several processes: any sharding restores any other, and a kill never damages a complete step."""

import functools
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import ranks_checkpoint
import torch
from ranks_checkpoint import KILL_WIDTH, MODES, assert_same, full_state, raw, resume_and_save

from nanochat import checkpoint, tree
from nanochat.checkpoint import CorruptCheckpointError, storage

pytestmark = pytest.mark.slow

RUNS = [f"{size}-{mode}" for size, modes in MODES.items() for mode in modes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 3, saved in each mode to a folder named after it."""
    folder = tmp_path_factory.mktemp("saved")
    for size in MODES:
        ranks.call(size, ranks_checkpoint.save_in_every_mode, folder)
    return folder


@pytest.mark.parametrize("size", MODES)
def test_any_sharding_restores_any_other(saved: Path, size: int) -> None:
    ranks.call(size, ranks_checkpoint.load_in_every_mode, saved)


@pytest.mark.parametrize("run", RUNS)
def test_all_ranks_write_every_shard_once_and_one_process_reads_params_and_files(saved: Path, run: str) -> None:
    size = int(run[0])
    full_bytes = tree.nbytes(tuple(tree.flatten(full_state(3)._asdict()).values()))
    state = saved / run / "3" / "state"
    parts = sorted(path.name for path in state.glob("ocdbt.process_*"))
    assert parts == [f"ocdbt.process_{rank}" for rank in range(size)]
    written = {part: sum(p.stat().st_size for p in (state / part).rglob("*") if p.is_file()) for part in parts}
    overhead = 2500 * size + 4000  # the index, which holds small leaves
    assert full_bytes <= sum(written.values()) + overhead, written
    stored = b"".join(p.read_bytes() for p in state.glob("ocdbt.process_*/d/*"))
    for row in range(0, 64, 16):
        assert stored.count(raw(full_state(3).params["wte"][row : row + 16])) == 1
    params, meta, files = checkpoint.load_params(saved / run)
    assert_same(full_state(3)._replace(params=params), full_state(3))
    assert meta == {"seed": 1, "rank": 0}
    assert files["me.py"].read_bytes() == Path(ranks_checkpoint.__file__).read_bytes()


def test_jax_and_orbax_alone_read_a_sharded_checkpoint(saved: Path) -> None:
    np.save(saved / "wte.npy", full_state(3).params["wte"].numpy())
    np.save(saved / "q.npy", full_state(3).params["h", "0", "q"].view(torch.int16).numpy())
    program = f"""
        import sys
        import jax, numpy as np, orbax.checkpoint as ocp
        from jax.sharding import NamedSharding, PartitionSpec
        mesh = jax.make_mesh((4,), ("x",))
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        reader = ocp.CheckpointManager({str(saved / "4-fsdp")!r}, item_names=("state", "meta"))
        params = {{"wte": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=sharding),
                   "h": {{"0": {{"q": jax.ShapeDtypeStruct((32, 40), jax.numpy.bfloat16, sharding=sharding)}}}}}}
        want = {{"params": params}}
        restore_args = ocp.checkpoint_utils.construct_restore_args(want)
        state_args = ocp.args.PyTreeRestore(want, restore_args=restore_args, partial_restore=True)
        items = ocp.args.Composite(state=state_args, meta=ocp.args.JsonRestore())
        got = reader.restore(reader.latest_step(), args=items)
        assert got.meta["meta"] == {{"seed": 1, "rank": 0}}
        wte, q = got.state["params"]["wte"], got.state["params"]["h"]["0"]["q"]
        assert isinstance(wte, jax.Array) and len(wte.addressable_shards) == 4 and wte.sharding == sharding
        np.testing.assert_array_equal(wte, np.load({str(saved / "wte.npy")!r}))
        np.testing.assert_array_equal(np.asarray(q).view(np.int16), np.load({str(saved / "q.npy")!r}))
        full = ocp.PyTreeCheckpointer().restore({str(saved / "4-hsdp" / "3" / "state")!r})
        np.testing.assert_array_equal(full["opt_state"]["big"], np.arange(8) * 2**59 + 2)
        assert full["opt_state"]["big"].dtype == np.int64 and full["step"] == 3
        assert not {{"torch", "nanochat"}} & set(sys.modules)
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=env, cwd=saved, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_missing_shard_is_reported(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "4-fsdp", tmp_path / "run")
    for path in (tmp_path / "run" / "3" / "state" / "ocdbt.process_2" / "d").iterdir():
        path.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"run/3: .*state cannot be read"):
        checkpoint.load_params(tmp_path / "run")


def test_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    ranks.call(4, ranks_checkpoint.fail_on_one_rank, tmp_path / "run")


def test_exit_of_one_rank_does_not_block_the_others(tmp_path: Path) -> None:
    ranks.call(4, ranks_checkpoint.exit_on_one_rank, tmp_path)
    assert_same(checkpoint.restore(tmp_path, full_state(1, 4096))[0], full_state(1, 4096))


def check_steps(folder: Path, allowed: set[int]) -> int:
    """Every complete step has to be intact, and the newest one of those allowed; return that."""
    complete = checkpoint.steps(folder)
    assert complete and complete[-1] in allowed
    for step in complete:
        want = full_state(step, KILL_WIDTH)
        assert_same(checkpoint.restore(folder, want, step=step)[0], want)
    return complete[-1]


def test_killed_save_never_damages_a_complete_step(tmp_path: Path) -> None:
    assert ranks.call(4, resume_and_save, tmp_path, "fsdp", 1) == [0] * 4
    kills = [
        (1, "plain", (0,), "while_writing"),
        (4, "fsdp", (2,), "while_writing"),
        (2, "fsdp", (0,), "after_writing"),
        (4, "hsdp", (0, 1, 2, 3), "before_writing"),
        (4, "replicate", (0,), "published"),
    ]
    for size, mode, victims, moment in kills:
        with ranks.start(size, resume_and_save, tmp_path, mode, 2, victims, moment) as job:
            finished = job.wait()
        # A rank that is not killed exits by itself, with the error that another one is lost.
        expected = [-9 if rank in victims else 0 for rank in range(size)]
        assert [rank.code for rank in finished] == expected, finished
        assert all(rank.value == (None if rank.code else 3) for rank in finished), finished
        assert check_steps(tmp_path, {1, 2}) == (2 if moment == "published" else 1)
        left = [path.name for path in tmp_path.iterdir() if not path.name.isdecimal()]
        assert bool(left) == (moment != "published"), left
    assert ranks.call(2, resume_and_save, tmp_path, "fsdp", 3) == [0] * 2
    assert check_steps(tmp_path, {3}) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_save_killed_at_ten_times_never_damages_a_complete_step(tmp_path: Path) -> None:
    """All ranks are killed and one of them, in turns."""
    jobs = [(4, "fsdp"), (2, "fsdp"), (4, "hsdp"), (4, "replicate"), (1, "plain")]
    assert ranks.call(4, resume_and_save, tmp_path, "fsdp", 1) == [0] * 4
    with ranks.start(4, resume_and_save, tmp_path, "fsdp", 2) as job:
        saving, returned, closed = [float(line.split()[1]) for line in job.wait()[0].out.splitlines()]
    assert check_steps(tmp_path, {2}) == 2
    moments = [("saving", (returned - saving) * i / 4) for i in range(4)]
    moments += [("returned", (closed - returned) * i / 6) for i in range(6)]
    latest, interrupted, lost = 2, 0, 0
    for number, (phase, delay) in enumerate(moments):
        (size, mode), kill_all = jobs[number % len(jobs)], number % 2
        with ranks.start(size, resume_and_save, tmp_path, mode, latest + 1) as job:
            while not all(phase in job.output(rank) for rank in range(size)):
                time.sleep(0.005)
            time.sleep(delay)
            for process in job.processes if kill_all else [job.processes[number % size]]:
                process.kill()
            finished = job.wait()
        assert {rank.code for rank in finished} <= {0, -9}, finished
        lost += 3 in [rank.value for rank in finished]
        interrupted += any("tmp" in path.name for path in tmp_path.iterdir())
        latest = check_steps(tmp_path, {latest, latest + 1})
    assert interrupted, f"no kill fell into the {closed - returned:.2f} s of writing"
    assert lost, "no rank met the loss of another"


def test_chunked_arrays_are_read_in_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "chunk_shape", functools.partial(storage.chunk_shape, limit_bytes=64))
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, full_state(1), {})
    assert_same(checkpoint.restore(manager, full_state(1))[0], full_state(1))
    checkpoint.close(manager)
    wte = full_state(1).params["wte"]
    got = storage.read_blocks(tmp_path / "1" / "state", {"params.wte": ((64, 64), (slice(3, 9), slice(1, 8)))})
    assert np.array_equal(got["params.wte"], wte[3:9, 1:8].numpy())
    assert storage.read_blocks(tmp_path / "1" / "state", {"params.wte": ((63, 64), (slice(3), slice(8)))}) == {}
