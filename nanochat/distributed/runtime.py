"""The process group, device and dtype of a process, read once into a frozen value and passed on explicitly."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
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
    """Rank, device and dtype of this process: torchrun's numbers; 0, 0, 1, 1, 0 without it."""

    rank: int
    local_rank: int
    world_size: int
    node_ranks: int
    restarts: int  # of the job (--max-restarts)
    device: torch.device
    compute_dtype: torch.dtype  # of activations, and of stored embedding tables unless it is float16

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that prints and writes logs."""
        return self.rank == 0


def init(device: str = "auto", dtype: str = "auto", *, quiet: bool = False) -> Runtime:
    """Read torchrun's environment, choose device and compute dtype, and join the process group if there is one.

    On the CPU, torch is set to deterministic algorithms: the same run gives the same bits. On CUDA, float32 products
    use TF32 where the GPU has it (Ampere and later).

    Args:
        device: auto (CUDA, else MPS, else CPU), cpu, cuda or mps.
        dtype: auto (bfloat16 where a GPU has it, else float16; float32 on a CPU), float32, bfloat16 or float16.
        quiet: only rank 0 prints; errors still show.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    chosen = choose_device(device, local_rank)
    compute_dtype = choose_dtype(dtype, chosen)
    if chosen.type == "cpu":
        # Otherwise a compiled embedding gradient is summed by the threads in any order, and a resumed run differs from
        # an uninterrupted one in the last bits. Filling new memory is for finding bugs, and takes time.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # cuDNN plans anew for every length, which evaluation and prompts keep changing; attention=cudnn still uses it.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world_size > 1:
        if chosen.type == "mps":
            raise UserError("device=mps runs in one process: drop --nproc_per_node or set device=cpu")
        if not dist.is_initialized():
            # gloo beside nccl: messages between the hosts do not wait for the GPUs
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            # torchrun keeps its store when it restarts a job, with the addresses of dead ranks under the old names
            store, *_ = next(rendezvous("env://"))
            store = PrefixStore(_start_id(store, rank, world_size), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
            control_group()  # connected now, when all ranks are here
        restarts = all_reduce_max(restarts)  # each node's agent counts its own
    if quiet and rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return Runtime(rank, local_rank, world_size, node_ranks, restarts, chosen, compute_dtype)


def _start_id(store: Any, rank: int, world_size: int) -> str:
    """Return an id of this start of the job, new and equal on all ranks, though the store outlives starts.

    Rank 0 answers the requests of the others, each with an id of its own: the store holds those of earlier starts.
    """
    if rank:
        request = uuid.uuid4().hex
        store.set(f"request {rank}", request)
        start_id = store.get(f"response {request}").decode()  # waits for it
        store.set(f"received {start_id} {rank}", "")
        return start_id
    start_id = uuid.uuid4().hex
    waiting = set(range(1, world_size))
    end = time.monotonic() + JOIN_SECONDS
    while waiting:
        for other in [other for other in waiting if store.check([f"request {other}"])]:
            store.set(f"response {store.get(f'request {other}').decode()}", start_id)
        waiting = {other for other in waiting if not store.check([f"received {start_id} {other}"])}
        if time.monotonic() > end:
            raise UserError(f"rank {min(waiting)} has not joined the job within {JOIN_SECONDS} s; its output says why")
        time.sleep(0.01)
    return start_id


def require_single(runtime: Runtime, what: str) -> None:
    """Raise a UserError if `what` was started as one of several processes."""
    if runtime.world_size > 1:
        raise UserError(f"{what} runs in one process: start it with python, not torchrun")


def mark_restart(key: str) -> None:
    """Set a mark that later starts of this job by torchrun see; does nothing without torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        next(rendezvous("env://"))[0].set(key, "")


def was_restarted(key: str) -> bool:
    """Return whether an earlier start of this job has set that mark."""
    return "TORCHELASTIC_RUN_ID" in os.environ and bool(next(rendezvous("env://"))[0].check([key]))


@contextlib.contextmanager
def distributed_context(device: str = "auto", dtype: str = "auto") -> Iterator[Runtime]:
    """Call `init` on entry and `close` on exit; only rank 0 prints.

    After an error the group is not closed: the other ranks would have to take part, and may wait elsewhere. Exit the
    process then, and torchrun stops them.
    """
    try:
        yield init(device, dtype, quiet=True)
    except SystemExit:  # all ranks exit together
        close()
        raise
    except RuntimeError as error:
        if dist.is_initialized() and re.search("Connection (closed|reset) by peer", str(error)):
            raise UserError("another rank of the job has exited; its output says why") from None
        raise
    close()


def all_reduce_max(value: int) -> int:
    """Return the largest `value` of all ranks."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return the sums of the `values` of all ranks, in float64."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def barrier() -> None:
    """Wait until every rank has called this."""
    all_reduce_max(0)


def close() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device for a setting (auto, cpu, cuda, mps); with CUDA, this rank's GPU, which becomes current."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if name not in available:
        raise UserError(f"device={name}: expected auto, cpu, cuda or mps")
    if not available[name]:
        raise UserError(f"device={name}: this machine or this torch build has no {name.upper()}; set device=cpu")
    if name != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(f"rank {local_rank} has no GPU: {count} here; lower --nproc_per_node to {count}")
    device = torch.device("cuda", local_rank)
    capability = torch.cuda.get_device_capability(device)
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        arch, wheel = "sm_{}{}".format(*capability), "CUDA 12.6 (cu126)" if capability < (7, 5) else "a newer CUDA"
        raise UserError(
            f"torch {torch.__version__} has no kernels for this {torch.cuda.get_device_name(device)} ({arch}): install "
            f"the torch wheel built for {wheel}, or set device=cpu"
        )
    torch.cuda.set_device(device)
    return device


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether a torch built for these ("sm_80", "compute_120") runs on a GPU of that compute capability.

    Machine code runs on its own major version from its minor version on, PTX ("compute_…") on all later GPUs.
    """
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)a?", name) for name in architectures]
    built = [(match[1], (int(match[2]), int(match[3]))) for match in built if match]
    if not built:  # ROCm
        return True
    return any(capability >= at and (kind == "compute" or capability[0] == at[0]) for kind, at in built)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for a setting; auto: bfloat16 where a GPU has it, else float16, and float32 on a CPU."""
    if device.type == "cuda":
        has_bfloat16, without = torch.cuda.get_device_capability(device) >= (8, 0), "this GPU is older than Ampere"
    else:
        # Metal has it since macOS 14.
        has_bfloat16, without = device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0), "it needs macOS 14"
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16 if has_bfloat16 else torch.float16
    if name not in DTYPES:
        raise UserError(f"dtype={name}: expected auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and not has_bfloat16:
        raise UserError(f"dtype=bfloat16: {without}; set dtype=float16 or dtype=float32")
    return DTYPES[name]


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the matmul limit of `device` in FLOP/s, and its source: the GPU table, else a measurement."""
    if device.type == "cuda":
        spec = hardware.gpu_spec(torch.cuda.get_device_name(device))
        if spec:
            limit = spec.single_flops if dtype == torch.float32 else spec.half_flops
            return limit, f"data sheet of {spec.device.removeprefix('NVIDIA ')}"
    # A CPU multiplies float16 a hundred times slower than float32.
    size = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 512
    return measure_matmul(size, device, dtype), f"measured, {size}x{size}x{size} matmul"


def measure_matmul(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the fastest of a few products of two (size, size) matrices."""
    generator = torch.Generator().manual_seed(0)  # leaves the global one alone
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    return 2 * size**3 / time_best(lambda: a @ b, device, tries=8, limit_seconds=0.6)  # every run starts with this


def time_best(
    f: Callable[[], Any], device: torch.device, *, tries: int, repeat: int = 1, limit_seconds: float = math.inf
) -> float:
    """Return the seconds of a call of `f`: the best of `tries` means over `repeat` calls, fewer beyond the limit.

    The calls of a try run back to back, so that the device does not wait for Python.
    """
    best, end = math.inf, time.perf_counter() + limit_seconds
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeat):
            f()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / repeat)
        if time.perf_counter() > end:
            break
    return best


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
    """Return the free memory of this process's GPU, or its share of the machine's available memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) * 1024 // node_ranks
    except (OSError, StopIteration):  # not Linux: half of all memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * node_ranks)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
