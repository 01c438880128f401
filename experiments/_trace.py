"""Profiler traces of a step: kernels and the gaps between them, collectives and the bytes they send."""

import collections
import gzip
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from nanochat import distributed
from nanochat.distributed import Runtime, ShardingPlan

MARK = "measured step"
Span = tuple[float, float]


class Trace(NamedTuple):
    """One profiled call, on the host's clock: start in microseconds, wall seconds, events in Chrome's trace format."""

    start: float
    seconds: float
    events: list[dict[str, Any]]


def trace(f: Callable[[], Any], runtime: Runtime, *, path: Path | None = None, shapes: bool = False) -> Trace:
    """Profile the second of two calls; `path` (.json or .json.gz) keeps both for chrome://tracing or perfetto."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (runtime.device.type == "cuda")
    with torch_profile(activities=activities, record_shapes=shapes) as profiler:
        f()
        distributed.synchronize(runtime.device)
        if runtime.world_size > 1:
            distributed.barrier()
        with record_function(MARK):
            f()
            distributed.synchronize(runtime.device)
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    mark = next(event for event in events if event["name"] == MARK and event.get("cat") != "gpu_user_annotation")
    inside = [event for event in events if event is not mark and _within(event, mark)]
    return Trace(mark["ts"], mark["dur"] / 1e6, inside)


def _within(event: Mapping[str, Any], mark: Mapping[str, Any]) -> bool:
    return mark["ts"] <= event["ts"] and event["ts"] + event.get("dur", 0) <= mark["ts"] + mark["dur"]


def total_seconds(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans."""
    total, end = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0.0)
        end = max(end, last)
    return total


def _spans(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def gpu_events(trace: Trace) -> list[dict[str, Any]]:
    """Return the kernels, copies and fills of a trace by start time."""
    found = [e for e in trace.events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(found, key=lambda event: event["ts"])


class Communication(NamedTuple):
    """Seconds of a step in which collectives ran, and in which only they ran."""

    seconds: float
    exposed_seconds: float


def communication(trace: Trace) -> Communication:
    """Return the time in collectives: NCCL kernels on a GPU; gloo's work and the waits for it on the CPU.

    The time includes waiting for slower ranks. On the CPU the exposed part is what the computing thread spends in
    starting collectives and waiting for them.
    """
    kernels = gpu_events(trace)
    if kernels:
        nccl = _spans(e for e in kernels if "nccl" in e["name"].lower())
        others = _spans(e for e in kernels if "nccl" not in e["name"].lower())
        return Communication(total_seconds(nccl) / 1e6, (total_seconds(nccl + others) - total_seconds(others)) / 1e6)
    waits = _spans(e for e in trace.events if e["name"].startswith("_c10d_functional::"))
    work = _spans(e for e in trace.events if e["name"].startswith("gloo:"))
    return Communication(total_seconds(waits + work) / 1e6, total_seconds(waits) / 1e6)


ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "unsigned char": 1}
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def sent_bytes(trace: Trace, sharding_plan: ShardingPlan) -> dict[str, float]:
    """Return the bytes that this rank sent in a traced step (with `shapes`), by kind: those of a ring.

    Of n bytes, an all-gather or a reduce-scatter over W ranks sends n·(W-1)/W from each, an all-reduce twice that, as
    in `planner.traffic`.

    Raises:
        LookupError: the trace does not say what was sent.
    """
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    calls = sorted((e for e in trace.events if e["name"].startswith("_c10d_functional::")), key=lambda e: e["ts"])
    waits = [call for call in calls if call["name"].endswith("::wait_tensor")]
    for call in calls:
        kind = next((kind for kind in KINDS if call["name"].split("::")[1].startswith(kind)), None)
        if kind is None:
            continue
        shards = sharding_plan.shards
        sizes, dtype = call["args"]["Input Dims"][0], call["args"]["Input type"][0]
        if dtype == "TensorList":  # the waits for the results have the dtypes
            grown = {"all_gather": shards, "reduce_scatter": 1 / shards}.get(kind, 1)
            items = [_item_bytes(_pop_wait(waits, call, math.prod(size) * grown)) for size in sizes]
        else:
            sizes, items = [sizes], [_item_bytes(call)]
        nbytes = sum(math.prod(size) * item for size, item in zip(sizes, items))
        if kind == "all_reduce":  # sharded parameters over the replicas, others over all ranks
            ranks = (
                sharding_plan.replicas
                if sharding_plan.replicas > 1 and len(sizes) == len(sharding_plan.sharded)
                else sharding_plan.ranks
            )
            found[kind] += 2 * nbytes * (ranks - 1) / ranks
        else:
            found[kind] += nbytes * (shards - 1) * (1 if kind == "all_gather" else 1 / shards)
    return found


def _item_bytes(event: Mapping[str, Any]) -> int:
    dtype = event["args"]["Input type"][0]
    if dtype not in ITEM_BYTES:
        raise LookupError(f"{event['name']} of {dtype}: unknown size")
    return ITEM_BYTES[dtype]


def _pop_wait(waits: list[dict[str, Any]], call: Mapping[str, Any], numel: float) -> dict[str, Any]:
    """Remove and return the first wait after a call for a result of that many elements."""
    for i, wait in enumerate(waits):
        same = wait["ts"] > call["ts"] and wait["tid"] == call["tid"]
        if same and math.prod(wait["args"]["Input Dims"][0]) == round(numel):
            return waits.pop(i)
    raise LookupError(f"{call['name']}: no wait for a result of {round(numel)} elements")


KERNELS = {
    "collectives": r"nccl",
    "attention": r"flash|fmha|flex|attention|sdpa",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|scaled_mm|splitk",
    "copies": r"memcpy|memset|copy_kernel|CatArray",
    "elementwise (compiled)": r"^triton_",
}


def kind_of(kernel: str) -> str:
    """Return the kind of work of a kernel, by its name."""
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


class Profile(NamedTuple):
    """The GPU's part of a traced step.

    Attributes:
        busy_seconds: with at least one kernel running. idle_seconds: the rest of the step.
        kinds: kind -> seconds. top: (kernel, seconds, calls), the longest first.
        gaps: (seconds, kernel before, kernel after), the longest first.
    """

    busy_seconds: float
    idle_seconds: float
    kinds: dict[str, float]
    top: list[tuple[str, float, int]]
    gaps: list[tuple[float, str, str]]


def profile(trace: Trace) -> Profile:
    """Return what the GPU did in a traced step, and how long it was idle."""
    kernels = gpu_events(trace)
    kinds: dict[str, float] = collections.defaultdict(float)
    seconds: dict[str, float] = collections.defaultdict(float)
    calls = collections.Counter(event["name"] for event in kernels)
    for event in kernels:
        kinds[kind_of(event["name"])] += event["dur"] / 1e6
        seconds[event["name"]] += event["dur"] / 1e6
    gaps, end, last = [], trace.start, "start of the step"
    for event in kernels:
        if event["ts"] > end:
            gaps.append(((event["ts"] - end) / 1e6, last, event["name"]))
        if event["ts"] + event["dur"] > end:
            end, last = event["ts"] + event["dur"], event["name"]
    busy = total_seconds(_spans(kernels)) / 1e6
    top = sorted(((name, value, calls[name]) for name, value in seconds.items()), key=lambda row: -row[1])
    kinds = dict(sorted(kinds.items(), key=lambda row: -row[1]))
    return Profile(busy, trace.seconds - busy, kinds, top, sorted(gaps, reverse=True))


def top_ops(f: Callable[[], Any], runtime: Runtime, count: int = 14) -> list[list[str]]:
    """Return table rows of the operations that take the largest share of a call's time."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (runtime.device.type == "cuda")
    with torch_profile(activities=activities) as profiler:
        f()
        distributed.synchronize(runtime.device)
    kind = "self_device_time_total" if runtime.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, kind), reverse=True)
    total = sum(getattr(event, kind) for event in events) or 1
    return [[event.key[:100], f"{getattr(event, kind) / total:.1%}"] for event in events[:count]]
