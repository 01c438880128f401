"""Training steps on a GPU, for bench_gpu: time, memory and profile, each beside its prediction."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from experiments import _bench, _trace, bench_train
from experiments._bench import TrainStepBench as Subject
from experiments._bench import timed
from experiments._gpu_bench import Bench, shape_of, tidy
from nanochat.distributed import GIB
from nanochat.model import ModelConfig
from nanochat.train import TrainState, planner

ROOM = 0.9  # share of the free memory that a planned batch may take: one that fails costs a compilation


def train_step(bench: Bench, depth: int, kind: Any) -> None:
    """Time the step of a depth at the largest batch that runs, alone and with accumulation."""
    config, here, shape = bench.config, bench.here, shape_of(bench.config, depth)
    fp8 = kind == "fp8"
    chunk_tokens = config.train.chunk_tokens or 8192
    room = torch.cuda.mem_get_info(here.device)[0] if bench.cuda else 0
    for rows in sorted(config.batches, reverse=True) if bench.cuda else [min(config.batches)]:
        setup = planner.Setup(dtype=here.compute_dtype, fp8=fp8, chunk_tokens=chunk_tokens)
        planned = planner.memory(shape, setup, rows=rows, micro_batches=1)
        if bench.cuda and planned.allocated > ROOM * room and rows > min(config.batches):
            print(f"  batch {rows}: planned {planned.allocated / GIB:.1f} GiB of {room / GIB:.1f}: not tried")
            continue
        parts = _bench.roofline(shape, rows, 1, bench.limits(), here.compute_dtype, fp8)
        floor = sum(parts.values())
        print(f"  predicted: {describe(parts)}; in all at least {1000 * floor:.1f} ms", flush=True)
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats(here.device)
        settings = bench_train.Config(
            depth=depth, head_dim=config.head_dim, vocab_size=config.vocab_size, sequence_len=config.sequence_len,
            window_pattern=config.window_pattern, batch_size=rows, rounds=config.rounds, compile=config.compile,
            train=dataclasses.replace(config.train, linear=kind),
        )  # fmt: skip
        try:
            it, result = bench_train.one(*bench_train.resolve(settings), here)
            break
        except torch.OutOfMemoryError as error:
            problem = str(error).splitlines()[0][:160]
        print(f"  batch {rows}: {problem}", flush=True)  # outside of the handler, which holds on to what did not fit
        bench.report(what="out of memory", depth=depth, linear=kind, rows=rows, planned=planned.allocated)
        tidy(bench)
    else:
        print("  no batch fits")
        return
    summary = {
        **result, "what": "step", "depth": depth, "linear": kind, "rows": rows, "predicted_seconds": floor,
        "planned_bytes": planned.allocated, "kernels": it.kernels,
    }  # fmt: skip
    bench.report(**summary)
    print(
        f"  depth {depth} {result['precision']}, {rows} rows: {result['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{result['mfu']:.1%} ({result['mfu_limit']}), step {1000 * result['step_seconds']:.1f} ms: "
        f"{result['step_seconds'] / floor:.2f} x the prediction; compiled in {result['compile_seconds']:.0f} s"
    )
    peak, planned_gib = result["peak_memory_bytes"], planned.allocated / GIB
    off = f"{peak / planned.allocated - 1:+.1%}" if bench.cuda else "not compared: the peak is the whole process's here"
    print(f"  memory: peak {peak / GIB:.2f} GiB, planned {planned_gib:.2f} ({off})", flush=True)
    if depth == config.profile_depth and kind == config.linears[0]:
        profile(bench, it, result["step_seconds"], parts, f"d{depth}_{kind}")
    accumulated(bench, it, shape, rows, result, {"depth": depth, "linear": kind, "rows": rows})


def describe(parts: Mapping[str, float]) -> str:
    """Return the parts of a prediction, in milliseconds."""
    return ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts.items() if seconds) + " ms"


def accumulated(
    bench: Bench, it: Subject, shape: ModelConfig, rows: int, result: dict[str, Any], which: dict[str, Any]
) -> None:
    """Time a step of as many micro-batches as pretraining takes on one GPU: the optimizer's share is smaller."""
    n = max(bench.config.step_tokens // (rows * shape.sequence_len), 1)
    if n == 1 or bench.seconds_left() < 4 * n * result["step_seconds"] + 10:
        return
    step = it.many(n)
    try:
        times = [timed(lambda: step(it.state), bench.here) for _ in range(3)]
    except torch.OutOfMemoryError:
        print(f"  {n} micro-batches: out of memory (their sum is in float32)")
        return
    seconds = statistics.median(times[1:])
    tokens = n * rows * shape.sequence_len
    mfu = result["mfu"] * (tokens / seconds) / result["tokens_per_second"]
    print(f"  with {n} micro-batches a step: {tokens / seconds:,.0f} tokens/s, MFU {mfu:.1%}", flush=True)
    bench.report(
        what="accumulated", **which, micro_batches=n, step_seconds=seconds,
        tokens_per_second=tokens / seconds, mfu=mfu,
    )  # fmt: skip


def profile(bench: Bench, it: Subject, seconds: float, parts: Mapping[str, float], name: str) -> None:
    """Print where the time of a step goes: kernels, idle gaps, waits of the host."""
    step: Callable[[], TrainState] = functools.partial(it.step, it.state)
    if not bench.cuda:
        print("  by operation (kernels, gaps of the GPU and synchronisations of the host: skipped, no GPU here):")
        print("\n".join(_trace.breakdown(step, bench.here, 5)))
        return
    path = bench.folder / f"trace_{name}.json.gz"
    found = _trace.profile(_trace.trace(step, bench.here, path=path))
    idle = max(1 - found.busy_seconds / seconds, 0.0)
    print(f"  profile: GPU busy {1000 * found.busy_seconds:.1f} of {1000 * seconds:.1f} ms: idle {idle:.1%} (predicted "
          f"under 3%); while profiled idle {1000 * found.idle_seconds:.1f} ms; {path}")  # fmt: skip
    for kind, value in found.kinds.items():
        print(f"    {value / found.busy_seconds:6.1%}  {1000 * value:8.2f} ms  {kind}")
    print(f"    predicted: {describe(parts)}")
    for kernel, value, calls in found.top[:20]:
        print(f"    {value / found.busy_seconds:6.1%}  {1000 * value:8.2f} ms  {calls:5} x {kernel[:90]}")
    for gap, before, after in found.gaps[:5]:
        print(f"    gap of {1e6 * gap:.0f} us between {before[:50]} and {after[:50]}")
    syncs = _bench.host_syncs(step)
    print(f"  synchronisations of the host within a step: {len(syncs)} (predicted: 0)")
    print("\n".join(f"    {line}" for line in sorted(set(syncs))[:8]))
    bench.report(what="profile", name=name, idle_share=idle, syncs=syncs, predicted=dict(parts), **found._asdict())
