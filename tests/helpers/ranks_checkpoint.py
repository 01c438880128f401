"""What the ranks of test_sharded_checkpoint.py do: `python -m tests.helpers.ranks_checkpoint <check> <size> <dir>`."""

import functools
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nanochat import distributed, tree
from nanochat.checkpoint import CheckpointConfig, storage
from nanochat.checkpoint import manager as checkpoint
from nanochat.config import UserError

JOBS = [(1, "plain"), (2, "replicate"), (2, "fsdp"), (4, "replicate"), (4, "zero2"), (4, "fsdp"), (4, "hsdp")]


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    scaler: Any


def whole_state(step: int, width: int = 64) -> State:
    """Plain tensors whose values follow from the step; leaves of every dtype, some of which no four ranks can cut."""
    g = torch.Generator().manual_seed(step)
    params = {
        "wte": torch.randn(64, width, generator=g),
        "h.0.q": torch.randn(12, 40, generator=g).bfloat16(),
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
    shape = {"replicate": (size, 1), "fsdp": (1, size), "zero2": (1, size), "hsdp": (2, size // 2)}.get(mode)
    return None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def placed(state: State, mode: str, mesh: DeviceMesh | None) -> State:
    """Shard a state as the mode has it, each leaf on its first dimension that divides; step and scaler stay plain."""
    if mesh is None:
        return state
    count = mesh.shape[1]

    def place(leaf: torch.Tensor, cut: bool) -> DTensor:
        dim = next((d for d, n in enumerate(leaf.shape) if n and n % count == 0), None) if cut and count > 1 else None
        placements = (Replicate(), Replicate() if dim is None else Shard(dim))
        return distribute_tensor(leaf, mesh, placements, src_data_rank=None)

    params = tree.unflatten({n: place(x, mode != "zero2") for n, x in tree.flatten(state.params).items()})
    opt_state = tree.unflatten({n: place(x, True) for n, x in tree.flatten(state.opt_state).items()})
    return state._replace(params=params, opt_state=opt_state)


def meta(state: State) -> State:
    """The abstract state: the same placements over meta tensors."""

    def empty(leaf: torch.Tensor) -> torch.Tensor:
        if isinstance(leaf, DTensor):
            local = leaf.to_local().to("meta")
            return DTensor.from_local(
                local, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
            )
        return leaf.to("meta")

    fields = {n: tree.unflatten({m: empty(x) for m, x in tree.flatten(f).items()}) for n, f in nested(state).items()}
    return state._replace(step=state.step.to("meta"), **fields)


def nested(state: State) -> dict[str, Any]:
    return {name: field for name, field in state._asdict().items() if name != "step"}


def raw(leaf: torch.Tensor) -> bytes:
    return leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(got: State, want: State) -> None:
    found, expected = tree.flatten(got._asdict()), tree.flatten(want._asdict())
    assert list(found) == list(expected)
    for name, b in expected.items():
        a = found[name]
        assert (type(a), a.shape, a.dtype) == (type(b), b.shape, b.dtype), name
        if isinstance(b, DTensor):
            assert isinstance(a, DTensor) and (a.device_mesh, a.placements) == (b.device_mesh, b.placements), name
            a, b = a.to_local(), b.to_local()
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and raw(a) == raw(b), name


class Job:
    """One of the processes; `part` makes the first so many of them a job of their own for a while."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder, self.parts = rank, size, folder, itertools.count()

    def join(self, size: int) -> None:
        at = f"file://{self.folder}/meeting-{next(self.parts)}"
        if size > 1 and self.rank < size:
            dist.init_process_group("gloo", init_method=at, rank=self.rank, world_size=size)

    def part(self, size: int) -> Iterator[None]:
        self.join(size)
        if self.rank < size:
            yield
            if size > 1:
                dist.destroy_process_group()


def messages(call: Callable[[], Any]) -> list[str]:
    """Return what the call raised on each rank, by class and message."""
    line = distributed.create_group()
    try:
        call()
        raised = "nothing"
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    found = distributed.all_gather_object(line, raised)
    distributed.destroy_group(line)
    return found


def save_on_every_job(job: Job) -> None:
    """Save step 3 by every one of JOBS into a folder of its name, and change the buffers as soon as that returns."""
    for size, mode in JOBS:
        for _ in job.part(size):
            state = placed(whole_state(3), mode, make_mesh(mode, size))
            manager = checkpoint.open_manager(job.folder / f"{size}-{mode}")
            arrays = {"loader.tokens": np.arange(1000, dtype=np.uint16), "scalar": torch.tensor(2**62 + 1)}
            meta = {"seed": 1, "rank": job.rank}
            checkpoint.save(manager, state, meta, arrays=arrays, files={"me.py": Path(__file__)})
            for leaf in tree.leaves(tuple(tree.flatten(field) for field in nested(state).values())):
                (leaf.to_local() if isinstance(leaf, DTensor) else leaf).zero_()
            checkpoint.add_metrics(manager, 3, {"val/bpb": 1.5})
            assert checkpoint.step_metrics(manager) == {3: {"val/bpb": 1.5}}
            checkpoint.close(manager)
    assert job.rank == 0 or not {"jax", "orbax.checkpoint"} & set(sys.modules)


def load_on_every_job(job: Job) -> None:
    """Load what each of JOBS saved by each of JOBS, from the manager or from the folder."""
    for size, mode in JOBS:
        for _ in job.part(size):
            want = placed(whole_state(3), mode, make_mesh(mode, size))
            for number, (by_size, by_mode) in enumerate(JOBS):
                folder = job.folder / f"{by_size}-{by_mode}"
                source = checkpoint.open_manager(folder) if number % 3 == 0 else folder
                got, values, arrays = checkpoint.restore(source, meta(want))
                assert_same(got, want)
                assert values == {"seed": 1, "rank": 0} and arrays["scalar"] == 2**62 + 1
                assert arrays["loader.tokens"].tobytes() == np.arange(1000, dtype=np.uint16).tobytes()
                params, _, files = checkpoint.load_params(folder)
                plain = whole_state(3)._replace(opt_state=tree.unflatten({}))
                assert_same(plain._replace(params=params), plain)
                assert files["me.py"].read_bytes() == Path(__file__).read_bytes()
                if isinstance(source, checkpoint.Manager):
                    checkpoint.close(source)


def fail_alike(job: Job) -> None:
    """One thing after the other goes wrong on one of four ranks."""
    job.join(4)
    mesh = make_mesh("hsdp", 4)
    make = functools.partial(whole_state, width=4096)  # 1 MB a leaf
    expect = functools.partial(_expect, job)
    manager = checkpoint.open_manager(job.folder / "run", CheckpointConfig(keep_last=None))
    checkpoint.save(manager, placed(make(1), "hsdp", mesh), {})

    def save(step: int, change: Callable[[State], Any] = lambda state: None, **arguments: Any) -> None:
        state = placed(make(step), "hsdp", mesh)
        change(state)
        checkpoint.save(manager, state, {}, **arguments)
        checkpoint.wait(manager)

    on = lambda rank, act: lambda state: act(state) if job.rank == rank else None  # noqa: E731
    expect("UserError: params.wte differs between rank 1 and rank 3: it should be equal on both")(
        save, 2, on(3, lambda s: s.params["wte"].to_local()[0, 0].add_(1))
    )
    expect("UserError: scaler.scale differs between rank 0 and rank 2: it should be equal on both")(
        save, 2, on(2, lambda s: s.scaler["scale"].mul_(2))
    )
    expect("UserError: step differs between rank 0 and rank 1: it should be equal on both")(
        save, 2, on(1, lambda s: s.step.add_(1))
    )
    expect("UserError: params.new differs between rank 0 and rank 1: it should be equal on both")(
        save, 2, on(1, lambda s: s.params.set("new", torch.zeros(2)))
    )
    expect("UserError: place differs between rank 0 and rank 3: it should be equal on both")(
        save, 2, arrays={"place": np.array([job.rank == 3])}
    )
    gone = job.folder / "gone"
    expect(f"UserError: {gone} cannot be copied to the checkpoint (No such file or directory)")(
        save, 2, files={"gone": gone}
    )
    odd = DTensor.from_local(
        torch.zeros(2 + job.rank % 2), mesh, (Replicate(), Shard(0)), shape=torch.Size([5]), stride=(1,)
    )
    expect(
        f"UserError: params.odd (5,) is placed {Shard(0)} over 2 ranks: checkpoints hold tensors that are replicated "
        "or evenly sharded"
    )(save, 2, lambda s: s.params.set("odd", odd))
    found = messages(lambda: save(2, on(1, lambda s: s.params.set("odd", "text"))))
    if job.rank == 0:
        assert len(set(found)) == 2 and "rank 1 failed: TypeError: params.odd" in found[0], found

    # The disk is full on rank 2 alone, in the background: all of them say so, and the next save works.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for surfaces in ("wait", "save", "close"):
        if job.rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        checkpoint.save(manager, placed(make(2), "hsdp", mesh), {})
        calls = {"save": lambda: save(3)}
        found = messages(calls.get(surfaces, functools.partial(getattr(checkpoint, surfaces), manager)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(set(found)) == 1, found
        assert "of step 2 could not be written" in found[0] and "(rank 2: " in found[0], found
        assert "too large" in found[0] and found[0].endswith("step 1 is intact"), found
        assert [path.name for path in (job.folder / "run").iterdir()] == ["1"]
    manager = checkpoint.open_manager(job.folder / "run", CheckpointConfig(keep_last=None))
    assert checkpoint.steps(manager) == [1]
    usage = shutil.disk_usage
    if job.rank == 0:
        shutil.disk_usage = lambda path: type(usage("/"))(10**9, 10**9 - 10**5, 10**5)
    found = messages(lambda: save(2))
    shutil.disk_usage = usage
    assert len(set(found)) == 1 and "step 2 needs" in found[0] and "0.1 MB free" in found[0], found
    save(2)
    save(2)  # is there, sound and the same
    there = job.folder / "run" / "2"
    expect(f"UserError: checkpoint {there} exists with another params.wte: delete it, or save to another folder")(
        save, 2, lambda s: s.params["wte"].to_local()[0, 0].add_(1)
    )

    # A byte of the part that rank 1 or 3 wrote.
    want = placed(make(2), "hsdp", mesh)
    if job.rank == 0:
        flip(job.folder / "run" / "2", make(2).params["wte"][40:42])
    dist.barrier()
    damaged = (
        f"CorruptCheckpointError: checkpoint {there}: params.wte is corrupt: bytes in {there}/state have changed; "
        f"step 1 exists too: delete {there} to resume from it"
    )
    expect(damaged)(checkpoint.restore, manager, meta(want))
    expect("UserError: no checkpoint of step 7 in " + str(job.folder / "run") + "; there are steps 1, 2")(
        checkpoint.restore, job.folder / "run", meta(want), 7
    )
    other = meta(want)
    other.params["wte"] = torch.empty(3, device="meta")
    expect(
        f"UserError: checkpoint {job.folder}/run/2 has params.wte (64, 4096) float32, this model expects (3) float32"
    )(checkpoint.restore, manager, other)
    save(2)  # is replaced
    assert_same(checkpoint.restore(manager, meta(want))[0], want)
    expect(f"UserError: checkpoint folder {__file__}/run cannot be created: Not a directory")(
        checkpoint.open_manager, Path(__file__) / "run"
    )
    checkpoint.close(manager)


def _expect(job: Job, message: str) -> Callable[..., None]:
    def check(call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        found = messages(lambda: call(*arguments, **named))
        assert found == [message] * job.size, found

    return check


def flip(step: Path, rows: torch.Tensor) -> None:
    """Flip a bit in the stored bytes of some rows."""
    stored = raw(rows)
    (path,) = [p for p in (step / "state").rglob("*") if p.is_file() and stored in p.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 4
    path.write_bytes(content)


def lose_a_rank(job: Job) -> None:
    """Rank 3 fails in its own code while a save is on its way: the save is completed, and the others learn soon."""
    job.join(4)
    mesh = make_mesh("fsdp", 4)
    manager = checkpoint.open_manager(job.folder / "run")
    checkpoint.save(manager, placed(whole_state(1, 4096), "fsdp", mesh), {})
    if job.rank == 3:
        checkpoint.close(manager)
        print("rank 3 fails", flush=True)
        os._exit(0)
    checkpoint.wait(manager)
    assert checkpoint.steps(job.folder / "run") == [1]
    begun = time.monotonic()
    try:
        checkpoint.save(manager, placed(whole_state(2), "fsdp", mesh), {})
    except distributed.LostRankError as error:
        assert str(error) == "another process of the job has ended or does not answer; its output says why"
    else:
        raise AssertionError("saved without rank 3")
    checkpoint.close(manager)
    assert time.monotonic() - begun < 20
    os._exit(0)  # the process group has lost a member


KILL_WIDTH = 20_000  # 10 MB of state


def kill_ranks(job: Job) -> None:
    """For every line `step size mode victim phase delay` fork a job that goes on from the last step and saves `step`.

    The victim (-1: all ranks) is killed so many seconds after the save began (phase 0) or went on in the background
    (phase 1); nobody is where the delay is negative. Prints the exit codes, 3 for a `UserError`, and of a job that
    lived the seconds until `save` returned and from there until the end on rank 0; kills who still lives after 20 s.
    """
    storage.orbax()
    for number, line in enumerate(sys.stdin):
        step, size, mode, victim, phase, delay = line.split()
        pipes = [os.pipe() for _ in range(int(size))]
        children = []
        for rank in range(int(size)):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = _go_on(job.folder, number, rank, int(size), mode, int(step), pipes[rank][1])
                finally:
                    os._exit(code)
            children.append(pid)
        for _, write in pipes:
            os.close(write)
        for _ in range(1 + int(phase)):
            for read, _ in pipes:
                os.read(read, 1)
        if float(delay) >= 0:
            time.sleep(float(delay))
            for pid in children if victim == "-1" else [children[int(victim)]]:
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        codes: dict[int, int] = {}
        while len(codes) < len(children):
            for pid in set(children) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGABRT)
            time.sleep(0.005)
        took = os.read(pipes[0][0], 100).decode().lstrip(".")
        for read, _ in pipes:
            os.close(read)
        print(json.dumps({"codes": [codes[pid] for pid in children], "took": took.split()}), flush=True)


def _go_on(folder: Path, number: int, rank: int, size: int, mode: str, step: int, pipe: int) -> int:
    meeting = f"file://{folder}/meeting-{number}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    mesh = make_mesh(mode, size)
    manager = checkpoint.open_manager(folder / "run", CheckpointConfig(keep_last=1))
    last = checkpoint.latest_step(manager)
    if last is not None:
        want = placed(whole_state(last, KILL_WIDTH), mode, mesh)
        assert_same(checkpoint.restore(manager, meta(want))[0], want)
    state = placed(whole_state(step, KILL_WIDTH), mode, mesh)
    try:
        os.write(pipe, b".")
        begun = time.monotonic()
        checkpoint.save(manager, state, {})
        os.write(pipe, b".")
        returned = time.monotonic()
        checkpoint.close(manager)
        os.write(pipe, f"{returned - begun} {time.monotonic() - returned}".encode())
        return 0
    except UserError:
        return 3


def under_torchrun(job: Job) -> None:
    """Rank 1 is killed while step 2 is being written; torchrun starts all ranks again, and they go on from step 1."""
    distributed.init("cpu")
    mesh = make_mesh("fsdp", job.size)
    manager = checkpoint.open_manager(job.folder / "run")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        checkpoint.save(manager, placed(whole_state(1), "fsdp", mesh), {})
        checkpoint.wait(manager)
        if job.rank == 1:
            write = storage.write_blocks

            def write_and_die(folder: Path, process: int, blocks: Any) -> None:
                write(folder, process, dict(list(blocks.items())[:2]))
                os.kill(os.getpid(), signal.SIGKILL)

            storage.write_blocks = write_and_die
        checkpoint.save(manager, placed(whole_state(2), "fsdp", mesh), {})
        checkpoint.close(manager)
        raise AssertionError("rank 1 lives")
    assert checkpoint.steps(manager) == [1]
    assert [path.name for path in (job.folder / "run").iterdir()] == ["1"]
    want = placed(whole_state(1), "fsdp", mesh)
    assert_same(checkpoint.restore(manager, meta(want))[0], want)
    checkpoint.save(manager, placed(whole_state(2), "fsdp", mesh), {})
    checkpoint.close(manager)
    dist.destroy_process_group()


def time_it(job: Job) -> None:
    """Save and restore 100 MB on one rank and on four."""
    for size, mode in [(1, "plain"), (4, "fsdp"), (4, "replicate")]:
        for _ in job.part(size):
            g = torch.Generator().manual_seed(0)
            params = tree.unflatten({f"h.{i}.w": torch.randn(1024, 1024, generator=g) for i in range(25)})
            whole = State(torch.tensor(1), params, tree.unflatten({}), tree.unflatten({}))
            state = placed(whole, mode, make_mesh(mode, size))
            manager = checkpoint.open_manager(job.folder / f"{size}-{mode}")
            for step in (1, 2, 3):
                seconds = [time.monotonic()]
                checkpoint.save(manager, state._replace(step=torch.tensor(step)), {})
                seconds.append(time.monotonic())
                checkpoint.wait(manager)
                seconds.append(time.monotonic())
                checkpoint.restore(manager, meta(state))
                seconds.append(time.monotonic())
            checkpoint.close(manager)
            if job.rank == 0:
                took = dict(zip(["save", "background", "restore"], np.diff(seconds).round(3).tolist()))
                print(json.dumps({"ranks": size, "mode": mode, **took}), flush=True)


def main() -> None:
    """Run a check, in the process that torchrun started, or in so many children."""
    check, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if "RANK" in os.environ or size == 1:
        globals()[check](Job(int(os.environ.get("RANK", 0)), size, folder))
        print("done", flush=True)
        return
    children = []
    for rank in range(size):  # forked: torch is imported once
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                globals()[check](Job(rank, size, folder))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(f"exit codes {codes}" if any(codes) else 0)


if __name__ == "__main__":
    main()
