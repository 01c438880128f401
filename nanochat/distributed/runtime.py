"""What torchrun and the machine give a process, read once into a frozen value and passed on explicitly."""

import contextlib
import dataclasses
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nanochat.config import UserError
from nanochat.distributed import hardware
from nanochat.distributed.collectives import control_group

JOIN_SECONDS = 600  # for all ranks to start
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The process's place in the job.

    Attributes:
        rank, local_rank, world_size, node_ranks: torchrun's numbers; 0, 0, 1, 1 without it.
        restarts: how often torchrun has started the job anew (--max-restarts).
        device: where this process computes.
        compute_dtype: dtype of activations (and of the embedding tables' storage, float16 apart).
    """

    rank: int
    local_rank: int
    world_size: int
    node_ranks: int
    restarts: int
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes logs."""
        return self.rank == 0


def init(device: str = "auto", dtype: str = "auto", *, quiet: bool = False) -> Runtime:
    """Read torchrun's environment, choose device and compute dtype, and join the process group if there is one.

    On the CPU, torch is set to deterministic algorithms: the same run gives the same bits.

    Args:
        device: auto (CUDA, else MPS, else CPU), cpu, cuda or mps.
        dtype: auto (bfloat16 on CUDA of capability 8.0 and above, else float32), float32, bfloat16 or float16.
        quiet: drop what ranks other than 0 print; errors still show.

    Raises:
        UserError: the machine has no such device, or the device cannot compute in that dtype.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    place = choose_device(device, local_rank)
    compute_dtype = choose_dtype(dtype, place)
    if place.type == "cpu":
        # Compiled, the gradient of an embedding is otherwise summed by all threads in any order: a resumed run would
        # differ from an unbroken one in the last bits. Filling fresh memory is for finding bugs, and takes time.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if world_size > 1:
        if place.type == "mps":
            raise UserError("device=mps runs in one process: drop --nproc_per_node or set device=cpu")
        if not dist.is_initialized():
            # gloo beside nccl: what is agreed upon between the ranks' hosts does not wait for the GPUs
            backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
            # torchrun keeps its store when it restarts a job; under the old names are the addresses of dead ranks
            store, *_ = next(rendezvous("env://"))
            store = PrefixStore(_attempt(store, rank, world_size), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
            control_group()  # connected now, when all ranks are here
        restarts = all_reduce_max(restarts)  # the agents of several nodes count by themselves
    if quiet and rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return Runtime(rank, local_rank, world_size, node_ranks, restarts, place, compute_dtype)


def _attempt(store: Any, rank: int, world_size: int) -> str:
    """Return a name for this start of the job, new and the same on all ranks, given a store that outlives starts.

    Rank 0 makes it up and tells it to whoever asks; only the living ask, and each by a question of its own.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question {rank}", question)
        name = store.get(f"answer {question}").decode()  # waits for it
        store.set(f"thanks {name} {rank}", "")
        return name
    name = uuid.uuid4().hex
    waiting = set(range(1, world_size))
    end = time.monotonic() + JOIN_SECONDS
    while waiting:
        for other in [other for other in waiting if store.check([f"question {other}"])]:
            store.set(f"answer {store.get(f'question {other}').decode()}", name)
        waiting = {other for other in waiting if not store.check([f"thanks {name} {other}"])}
        if time.monotonic() > end:
            raise UserError(f"rank {min(waiting)} has not joined the job within {JOIN_SECONDS} s; its output says why")
        time.sleep(0.01)
    return name


def mark_restart(key: str) -> None:
    """Keep a word for later starts of this job by torchrun; without torchrun there are none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        next(rendezvous("env://"))[0].set(key, "")


def was_restarted(key: str) -> bool:
    """Return whether an earlier start of this job has kept that word."""
    return "TORCHELASTIC_RUN_ID" in os.environ and bool(next(rendezvous("env://"))[0].check([key]))


@contextlib.contextmanager
def distributed_context(device: str = "auto", dtype: str = "auto") -> Iterator[Runtime]:
    """Within, this process is part of the job: `create`, and `close` at the end; only rank 0 prints.

    After an error the group is not closed: the other ranks, which would have to take part, may wait elsewhere. End the
    process then, and torchrun ends them.

    Raises:
        UserError: another rank has ended, and its connection with it.
    """
    try:
        yield init(device, dtype, quiet=True)
    except SystemExit:  # a stop that all ranks agreed upon
        close()
        raise
    except RuntimeError as error:
        if dist.is_initialized() and re.search("Connection (closed|reset) by peer", str(error)):
            raise UserError("another rank of the job has ended; its output says why") from None
        raise
    close()


def all_reduce_max(value: int) -> int:
    """Return the largest `value` of all ranks; `value` itself in a process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return the sums of the `values` of all ranks, in float64; the values themselves in a process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found)
    return found.tolist()


def barrier() -> None:
    """Return when every rank has come here; at once in a process alone."""
    all_reduce_max(0)


def close() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device that a setting names (auto, cpu, cuda, mps), this rank's own GPU; UserError: not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "device=cuda: this machine or this torch build has no CUDA; set device=cpu or install a CUDA build"
            )
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"rank {local_rank} has no GPU: {count} here; lower --nproc_per_node to {count}")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
        return place
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps: this machine or this torch build has no MPS; set device=cpu")
        return torch.device("mps")
    if name == "cpu":
        return torch.device("cpu")
    raise UserError(f"device={name}: expected auto, cpu, cuda or mps")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype that a setting names; auto is what the device is fast in. UserError: unknown."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if name == "auto":
        return torch.bfloat16 if capability >= (8, 0) else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype={name}: expected auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and device.type == "cuda" and capability < (8, 0):
        raise UserError("dtype=bfloat16: this GPU is older than Ampere; set dtype=float16 or dtype=float32")
    return DTYPES[name]


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the matmul limit of `device` in FLOP/s, and where the figure is from.

    A known GPU has its data sheet's; anything else is measured, by the best of a few large products.
    """
    if device.type == "cuda":
        machine = hardware.gpu_spec(torch.cuda.get_device_name(device))
        if machine:
            limit = machine.single_flops if dtype == torch.float32 else machine.half_flops
            return limit, f"data sheet of {machine.device.removeprefix('NVIDIA ')}"
    # A CPU multiplies float16 a hundred times slower than float32.
    size = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 512
    return measure_matmul(size, device, dtype), f"measured, {size}x{size}x{size} matmul"


def measure_matmul(size: int, device: torch.device, dtype: torch.dtype, tries: int = 8, seconds: float = 0.6) -> float:
    """Return FLOP/s of the fastest product of two (size, size) matrices.

    Args:
        tries: so many products, or fewer where `seconds` are over: a run begins with it.
    """
    generator = torch.Generator().manual_seed(0)  # the global one belongs to the run
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: tensors on CUDA, the process on CPU; on MPS what the driver holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # /proc is about this process alone; getrusage starts at the peak of the process that started it.
    status = Path("/proc/self/status")
    if peak_kib := status.exists() and re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE):
        return int(peak_kib[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes, except on macOS


def free_bytes(device: torch.device, node_ranks: int = 1) -> int:
    """Return the memory that this process may fill: of its GPU, or its share of what the machine has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) * 1024 // node_ranks
    except (OSError, StopIteration):  # no Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * node_ranks)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
