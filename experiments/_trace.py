"""Profiles of a step: kernels and the gaps between them, host synchronizations, collectives and the bytes they send."""

import collections
import gzip
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from nanochat import distributed
from nanochat.distributed import Runtime, ShardingPlan
from nanochat.text import table

MARK = "measured step"
Event = dict[str, Any]  # of Chrome's trace format; times in microseconds
Span = tuple[float, float]


class Trace(NamedTuple):
    """One profiled call, and the host's time by operation for it and the call before (not with `shapes`)."""

    start: float  # in microseconds
    seconds: float
    events: list[Event]
    host_times: Mapping[str, float] = {}  # in microseconds, without the operations within an operation


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
        path = path or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    mark = next(event for event in events if event["name"] == MARK and event.get("cat") != "gpu_user_annotation")
    start, end = mark["ts"], mark["ts"] + mark["dur"]
    inside = [e for e in events if e is not mark and start <= e["ts"] and e["ts"] + e.get("dur", 0) <= end]
    averages = [] if shapes else profiler.key_averages()  # takes a second
    host_times = {op.key: op.self_cpu_time_total for op in averages if op.key != MARK}
    return Trace(start, mark["dur"] / 1e6, inside, host_times)


def total_seconds(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans in microseconds."""
    total, end = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0.0)
        end = max(end, last)
    return total / 1e6


def _spans(events: Iterable[Event]) -> list[Span]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def gpu_events(trace: Trace) -> list[Event]:
    """Return the kernels, copies and fills of a trace by start time."""
    events = [e for e in trace.events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(events, key=lambda event: event["ts"])


# Collectives


def communication(trace: Trace) -> tuple[float, float]:
    """Return the seconds in which collectives ran, and in which only they ran: NCCL kernels; on the CPU gloo's work.

    The time includes waiting for slower ranks. On the CPU the exposed part is what the computing thread spends in
    starting collectives and waiting for them.
    """
    if kernels := gpu_events(trace):
        nccl = _spans(e for e in kernels if "nccl" in e["name"].lower())
        others = _spans(e for e in kernels if "nccl" not in e["name"].lower())
        return total_seconds(nccl), total_seconds(nccl + others) - total_seconds(others)
    waits = _spans(e for e in trace.events if e["name"].startswith("_c10d_functional::"))
    work = _spans(e for e in trace.events if e["name"].startswith("gloo:"))
    return total_seconds(waits + work), total_seconds(waits)


ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "unsigned char": 1}
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def sent_bytes(trace: Trace, sharding_plan: ShardingPlan) -> dict[str, float]:
    """Return the bytes that this rank sent in a traced step (with `shapes`), by kind, counted as in `planner.traffic`.

    LookupError: the trace does not say what was sent.
    """
    sent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    calls = sorted((e for e in trace.events if e["name"].startswith("_c10d_functional::")), key=lambda e: e["ts"])
    waits = [call for call in calls if call["name"].endswith("::wait_tensor")]
    shards = sharding_plan.shards
    for call in calls:
        kind = next((kind for kind in KINDS if call["name"].split("::")[1].startswith(kind)), None)
        if kind is None:
            continue
        sizes, dtype = call["args"]["Input Dims"][0], call["args"]["Input type"][0]
        if dtype == "TensorList":  # the waits for the results have the dtypes
            growth = {"all_gather": shards, "reduce_scatter": 1 / shards}.get(kind, 1)
            items = [_item_bytes(_pop_wait(waits, call, math.prod(size) * growth)) for size in sizes]
        else:
            sizes, items = [sizes], [_item_bytes(call)]
        nbytes = sum(math.prod(size) * item for size, item in zip(sizes, items))
        if kind == "all_reduce":  # sharded parameters over the replicas, others over all ranks
            of_sharded = sharding_plan.replicas > 1 and len(sizes) == len(sharding_plan.sharded)
            ranks = sharding_plan.replicas if of_sharded else sharding_plan.ranks
            sent[kind] += 2 * nbytes * (ranks - 1) / ranks
        else:
            sent[kind] += nbytes * (shards - 1) * (1 if kind == "all_gather" else 1 / shards)
    return sent


def _item_bytes(event: Event) -> int:
    dtype = event["args"]["Input type"][0]
    if dtype not in ITEM_BYTES:
        raise LookupError(f"{event['name']} of {dtype}: unknown size")
    return ITEM_BYTES[dtype]


def _pop_wait(waits: list[Event], call: Event, numel: float) -> Event:
    """Remove and return the first wait after a call for a result of that many elements."""
    for i, wait in enumerate(waits):
        same = wait["ts"] > call["ts"] and wait["tid"] == call["tid"]
        if same and math.prod(wait["args"]["Input Dims"][0]) == round(numel):
            return waits.pop(i)
    raise LookupError(f"{call['name']}: no wait for a result of {round(numel)} elements")


# Where the time of a step goes


KERNELS = {
    "collectives": r"nccl",
    "attention": r"flash|fmha|flex|attention|sdpa",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|scaled_mm|splitk",
    "copies": r"memcpy|memset|copy_kernel|CatArray",
    "elementwise (compiled)": r"^triton_",
}


class Profile(NamedTuple):
    """What the GPU did in a traced step; each list begins with the longest."""

    busy_seconds: float  # with at least one kernel running
    kinds: dict[str, float]  # kind of work -> seconds
    top: list[tuple[str, float, int]]  # kernel, seconds, calls
    gaps: list[tuple[float, str, str]]  # seconds, kernel before, kernel after


def profile(trace: Trace) -> Profile:
    kernels = gpu_events(trace)
    kinds: dict[str, float] = collections.defaultdict(float)
    seconds: dict[str, float] = collections.defaultdict(float)
    calls = collections.Counter(event["name"] for event in kernels)
    gaps, end, last = [], trace.start, "start of the step"
    for event in kernels:
        name = event["name"]
        kind = next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        kinds[kind] += event["dur"] / 1e6
        seconds[name] += event["dur"] / 1e6
        if event["ts"] > end:
            gaps.append(((event["ts"] - end) / 1e6, last, name))
        if event["ts"] + event["dur"] > end:
            end, last = event["ts"] + event["dur"], name
    busy = total_seconds(_spans(kernels))
    kinds = dict(sorted(kinds.items(), key=lambda row: -row[1]))
    top = sorted(((name, value, calls[name]) for name, value in seconds.items()), key=lambda row: -row[1])
    return Profile(busy, kinds, top, sorted(gaps, reverse=True))


def print_profile(step: Callable[[], Any], runtime: Runtime, seconds: float, path: Path | None) -> dict[str, Any]:
    """Print where the time of a step of `seconds` goes; on a GPU by kernel, with idle gaps and waits of the host."""
    traced = trace(step, runtime, path=path if runtime.is_main else None)
    if runtime.device.type != "cuda":
        times = sorted(traced.host_times.items(), key=lambda row: -row[1])
        total = sum(traced.host_times.values())
        print("time of a step by operation:")
        print(table([[name[:100], f"{time / total:.1%}"] for name, time in times[:14]]))
        return {}
    gpu = profile(traced)
    idle = max(1 - gpu.busy_seconds / seconds, 0.0)
    print(f"time of a step by kernel: GPU busy {1e3 * gpu.busy_seconds:.1f} of {1e3 * seconds:.1f} ms: idle {idle:.1%} "
          f"(expected under 3%); while profiled idle {1e3 * (traced.seconds - gpu.busy_seconds):.1f} ms")  # fmt: skip
    rows = [(kind, value, "") for kind, value in gpu.kinds.items()]
    rows += [(name[:90], value, f"{calls} calls") for name, value, calls in gpu.top[:20]]
    print(table([[name, f"{t / gpu.busy_seconds:.1%}", f"{1e3 * t:.2f} ms", calls] for name, t, calls in rows]))
    for gap, before, after in gpu.gaps[:5]:
        print(f"  gap of {1e6 * gap:.0f} us between {before[:50]} and {after[:50]}")
    syncs = host_syncs(step)
    print(f"  host synchronizations within a step: {len(syncs)} (expected: 0)", *sorted(set(syncs))[:8], sep="\n    ")
    return {"idle_share": idle, "seconds_by_kind": gpu.kinds, "host_syncs": len(syncs)}


def host_syncs(f: Callable[[], Any]) -> list[str]:
    """Return where a call makes the host wait for the GPU: file, line and CUDA's message, one entry each time."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            f()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    syncs = [w for w in caught if "called a synchronizing" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}: {str(w.message).splitlines()[0][:120]}" for w in syncs]
