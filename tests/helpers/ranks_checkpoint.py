"""A small state in every sharding mode, and what the ranks of test_sharded_checkpoint.py do with it."""

import contextlib
import functools
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nanochat import distributed, tree
from nanochat.checkpoint import CheckpointConfig, CorruptCheckpointError, storage
from nanochat.checkpoint import manager as checkpoint
from nanochat.config import UserError
from nanochat.distributed import sharding

MODES = {1: ["plain"], 2: ["replicate", "fsdp"], 4: ["replicate", "zero2", "fsdp", "hsdp"]}  # by number of ranks
KILL_WIDTH = 20_000  # 10 MB of state


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    scaler: Any


def full_state(step: int, width: int = 64) -> State:
    """Plain tensors of every dtype with values that follow from the step; some do not divide by four."""
    g = torch.Generator().manual_seed(step)
    params = {
        "wte": torch.randn(64, width, generator=g),
        "h.0.q": torch.randn(32, 40, generator=g).bfloat16(),
        "h.0.k": torch.randn(32, 40, generator=g).bfloat16(),
        "h.0.columns": torch.randn(3, 16, generator=g).bfloat16(),
        "h.1.half": torch.randn(4, generator=g).half(),
        "h.1.odd": torch.randn(5, 7, generator=g),
    }
    opt_state = {
        "wte.mu": torch.randn(64, width, generator=g),
        "big": torch.arange(8) * 2**59 + step - 1,
        "mask": torch.arange(8) % 3 == 0,
        "bytes": torch.arange(256, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "count": torch.tensor(step, dtype=torch.int32),
    }
    scaler = tree.unflatten({"scale": torch.tensor(65536.0)})
    return State(torch.tensor(step), tree.unflatten(params), tree.unflatten(opt_state), scaler)


def make_mesh(mode: str, size: int) -> DeviceMesh | None:
    shapes = {"replicate": (size, 1), "fsdp": (1, size), "zero2": (1, size), "hsdp": (2, size // 2)}
    return init_device_mesh("cpu", shapes[mode], mesh_dim_names=("replicate", "shard")) if mode in shapes else None


def place(state: State, mode: str, mesh: DeviceMesh | None) -> State:
    """Shard each leaf on its first dimension that divides; `step` and `scaler` stay plain."""
    if mesh is None:
        return state
    count = mesh.shape[1]

    def place_leaf(leaf: torch.Tensor, sharded: bool = True) -> DTensor:
        even = [d for d, n in enumerate(leaf.shape) if n and n % count == 0] if sharded and count > 1 else []
        placements = (Replicate(), Shard(even[0]) if even else Replicate())
        return distribute_tensor(leaf, mesh, placements, src_data_rank=None)

    params = tree.map(functools.partial(place_leaf, sharded=mode != "zero2"), state.params)
    return state._replace(params=params, opt_state=tree.map(place_leaf, state.opt_state))


def abstract(state: State) -> State:
    return sharding.as_dtensors(tree.to(sharding.local_shards(state), "meta"), state)


def save_steps(folder: Path, *steps: int, **options: Any) -> checkpoint.Manager:
    """Save steps, all of which are kept by default; return the open manager."""
    manager = checkpoint.open_manager(folder, CheckpointConfig(**{"keep_last": None, **options}))
    for step in steps:
        checkpoint.save(manager, full_state(step), {"seed": 1})
    checkpoint.wait(manager)
    return manager


def raw(leaf: torch.Tensor) -> bytes:
    return leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def flip_bit(step: Path, leaf: torch.Tensor) -> None:
    """Flip a bit in the stored bytes of a leaf, or of rows of it, over a kilobyte; smaller ones lie under a CRC."""
    stored = raw(leaf)
    (path,) = [p for p in (step / "state").rglob("*") if p.is_file() and stored in p.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 4
    path.write_bytes(content)


def assert_same(got: State, want: State) -> None:
    actual, expected = tree.flatten(got._asdict()), tree.flatten(want._asdict())
    assert list(actual) == list(expected)
    for name, b in expected.items():
        a = actual[name]
        assert (type(a), a.shape, a.dtype) == (type(b), b.shape, b.dtype), name
        if isinstance(b, DTensor):
            assert isinstance(a, DTensor) and (a.device_mesh, a.placements) == (b.device_mesh, b.placements), name
            a, b = a.to_local(), b.to_local()
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and raw(a) == raw(b), name


def save_in_every_mode(folder: Path) -> None:
    """Save step 3 to a folder for each mode, and overwrite the buffers as soon as `save` returns."""
    here = distributed.init("cpu")
    if here.rank > 0:
        storage.orbax = lambda: 1 / 0  # only rank 0 imports jax and orbax
    for mode in MODES[here.world_size]:
        state = place(full_state(3), mode, make_mesh(mode, here.world_size))
        manager = checkpoint.open_manager(folder / f"{here.world_size}-{mode}")
        tokens = np.arange(1000, dtype=np.uint16)
        arrays = {"loader.tokens": tokens, "scalar": torch.tensor(2**62 + 1)}
        meta = {"seed": 1, "rank": here.rank}
        checkpoint.save(manager, state, meta, arrays=arrays, files={"me.py": Path(__file__)})
        for leaf in tree.leaves(sharding.local_shards(state[1:])):
            leaf.zero_()
        tokens[:] = 0
        checkpoint.add_metrics(manager, 3, {"val/bpb": 1.5})
        checkpoint.close(manager)
        assert checkpoint.step_metrics(manager.folder) == {3: {"val/bpb": 1.5}}
    distributed.close()


def load_in_every_mode(folder: Path) -> None:
    """Restore in each mode what was saved in each mode, from a manager or from the folder."""
    here = distributed.init("cpu")
    for mode in MODES[here.world_size]:
        want = place(full_state(3), mode, make_mesh(mode, here.world_size))
        for number, run in enumerate(sorted(folder.iterdir())):
            source = checkpoint.open_manager(run) if number % 4 == 0 else run
            got, meta, arrays = checkpoint.restore(source, abstract(want))
            assert_same(got, want)
            assert meta == {"seed": 1, "rank": 0} and arrays["scalar"] == 2**62 + 1
            assert arrays["loader.tokens"].tobytes() == np.arange(1000, dtype=np.uint16).tobytes()
            if isinstance(source, checkpoint.Manager):
                checkpoint.close(source)
    distributed.close()


def fail_on_one_rank(folder: Path) -> None:
    """Let one thing after the other go wrong on one of four ranks; every rank has to raise the same error."""
    here = distributed.init("cpu")
    mesh = make_mesh("hsdp", 4)

    def make(step: int) -> State:
        return place(full_state(step, 4096), "hsdp", mesh)  # 1 MB a leaf

    def save(message: str = "", rank: int | None = None, change: Any = lambda state: None, **arguments: Any) -> None:
        """Save step 2, which one rank or all change before; with a message, expect that error."""
        state = make(2)
        if rank in (None, here.rank):
            change(state)
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            checkpoint.save(manager, state, {}, **arguments)
            checkpoint.wait(manager)

    manager = checkpoint.open_manager(folder, CheckpointConfig(keep_last=None))
    checkpoint.save(manager, make(1), {})
    save("params.wte differs between rank 1 and rank 3", 3, lambda s: s.params["wte"].to_local()[0, 0].add_(1))
    save("scaler.scale differs between rank 0 and rank 2", 2, lambda s: s.scaler["scale"].mul_(2))
    save("params.new differs between rank 0 and rank 1", 1, lambda s: s.params.set("new", torch.zeros(2)))
    save("position differs between rank 0 and rank 3", arrays={"position": np.array([here.rank == 3])})
    save("gone cannot be copied to the checkpoint", files={"gone": folder / "gone"})
    bug = (TypeError, "not JSON serializable") if here.rank == 1 else (RuntimeError, "rank 1 failed: TypeError")
    with pytest.raises(bug[0], match=bug[1]):
        checkpoint.save(manager, make(2), {"x": object() if here.rank == 1 else 1})
    local = torch.zeros(2 + here.rank % 2)
    odd = DTensor.from_local(local, mesh, (Replicate(), Shard(0)), shape=torch.Size([5]), stride=(1,))
    save(r"params.odd \(5,\) is placed S\(0\) over 2 ranks", change=lambda s: s.params.set("odd", odd))

    # The disk is full on rank 2 only, in the background; the next save works.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here.rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    save(r"step 2 could not be written to .* \(rank 2: .*too large.*step 1 is intact$")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.iterdir()] == ["1"] and checkpoint.steps(manager) == [1]
    usage = shutil.disk_usage
    if here.rank == 0:
        shutil.disk_usage = lambda path: type(usage("/"))(10**9, 10**9 - 10**5, 10**5)
    save("step 2 needs .* has 0.1 MB free")
    shutil.disk_usage = usage
    save()
    save()  # it exists, and is equal
    save("2 exists with another params.wte: delete it", change=lambda s: s.params["wte"].to_local()[0, 0].add_(1))

    # A flipped bit in the shard that rank 1 or 3 wrote.
    want = make(2)
    if here.rank == 0:
        flip_bit(folder / "2", full_state(2, 4096).params["wte"][40:42])
    torch.distributed.barrier()
    with pytest.raises(CorruptCheckpointError, match=r"params.wte is corrupt: .*; step 1 exists too: delete .*/2 to"):
        checkpoint.restore(manager, abstract(want))
    save()  # the corrupt step is replaced
    assert_same(checkpoint.restore(manager, abstract(want))[0], want)
    with pytest.raises(UserError, match=r"checkpoint folder .*/run cannot be created: Not a directory"):
        checkpoint.open_manager(Path(__file__) / "run")
    checkpoint.close(manager)
    distributed.close()


def exit_on_one_rank(folder: Path) -> None:
    """Rank 3 exits while a save is being written: that save is completed, the next one fails soon."""
    here = distributed.init("cpu")
    mesh = make_mesh("fsdp", 4)
    manager = checkpoint.open_manager(folder)
    checkpoint.save(manager, place(full_state(1, 4096), "fsdp", mesh), {})
    if here.rank == 3:
        checkpoint.close(manager)
        os._exit(0)
    checkpoint.wait(manager)
    assert checkpoint.steps(folder) == [1]
    started = time.monotonic()
    # Rank 1 is no neighbor of rank 3: it notices last, maybe after rank 0 has closed the store.
    lost = r"^(rank ([012] or )*3|another rank) of the job has exited or does not answer; its output says why$"
    with pytest.raises(distributed.LostRankError, match=lost):
        checkpoint.save(manager, place(full_state(2), "fsdp", mesh), {})
    checkpoint.close(manager)
    assert time.monotonic() - started < 100


def resume_and_save(folder: Path, mode: str, step: int, victims: tuple[int, ...] = (), moment: str = "") -> int:
    """Restore the last step and save `step`; victims are killed at a moment of that. Return 0, or 3 after an error.

    Moments: before_writing, while_writing and after_writing their shards, published (rank 0 only: the step is complete,
    the older one deleted, and the other ranks do not know yet).
    """
    here = distributed.init("cpu")
    mesh = make_mesh(mode, here.world_size)
    manager = checkpoint.open_manager(folder, CheckpointConfig(keep_last=1))
    last = checkpoint.latest_step(manager)
    if last is not None:
        want = place(full_state(last, KILL_WIDTH), mode, mesh)
        assert_same(checkpoint.restore(manager, abstract(want))[0], want)
    state = place(full_state(step, KILL_WIDTH), mode, mesh)
    if here.rank in victims:
        _kill_at(moment)
    try:
        print("saving", time.monotonic(), flush=True)
        checkpoint.save(manager, state, {})
        print("returned", time.monotonic(), flush=True)
        checkpoint.close(manager)
        print("closed", time.monotonic(), flush=True)
    except UserError:
        return 3
    return 0


def _kill_at(moment: str) -> None:
    name = "remove_partial_steps" if moment == "published" else "write_blocks"
    original = getattr(storage, name)

    def and_kill(*arguments: Any) -> None:
        if moment == "while_writing":
            folder, process, blocks = arguments
            original(folder, process, dict(list(blocks.items())[:2]))
        elif moment != "before_writing":
            original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(storage, name, and_kill)
