r"""Measure the training step: tokens/s, FLOP utilization and memory, beside the machine's matmul limit.

    python launch.py --experiment=bench_train                            # a small shape, for a laptop
    python launch.py --experiment=bench_train --set depth=20             # the shape that pretrain has at a depth
    torchrun --nproc_per_node=8 launch.py --experiment=bench_train --set depth=20 --set sharding.mode=fsdp
    torchrun --nproc_per_node=8 launch.py --experiment=bench_train --set what=sweep --set depth=20 \
        --set modes=replicate,zero2,fsdp --set precisions=bf16,fp8
    python launch.py --experiment=bench_train --set what=scaling --set depth=20      # all GPUs of this machine
    python launch.py --experiment=bench_train --set suite=gpu --set minutes=12       # checks and times one GPU
    python launch.py --experiment=bench_train --set suite=gpu --set dry_run=true     # the same in tiny shapes, anywhere

what=step: forward, backward, Muon and AdamW, timed in rounds that alternate with large square matmuls, so that both
see the same machine. Prints a table, a profile and one JSON line. Two minutes on two CPU cores, most of it compiling.

what=sweep: every combination of modes, kernels, precisions and compiles, each in a job on as many ranks as this one
has; if compiled, first with an empty compiler cache and then with a warm one. Two to three minutes each on a GPU.

what=scaling: jobs of 1, 2, 4, ... ranks. Weak: every rank has one micro-batch. Strong: a step has as many tokens as in
the largest job, so that fewer ranks have more micro-batches. On the CPU all have the same number of threads a rank. One
to three minutes for every mode and number of ranks.

what=limits: large products and a copy beside the GPU's data sheet. what=kernels: these, linear layers in both
precisions, and attention by window.

what=members: N models in one step (`nanochat.train.functional`) beside N single steps: the ratio of their times, and
how far their losses differ. On a GPU: --set depth=4 --set members=16. Two minutes, most of it compiling.

suite=gpu: units of work, the most valuable first, each in a process with a time limit that compiling with an empty
cache fits: pytest -m gpu; limits; training steps of depth 20 with a named attention kernel, then with auto, in bf16 and
fp8; decoding of 1, 8 and 64 sequences with prefill; 16 members in one step; kernels. It begins with what the GPU's data
sheet lets expect, and ends with what was measured beside that, as a table for experiments/RESULTS.md. What fails or
takes too long does not stop the rest; each result is written at once, and another start of the same commit on the same
machine adds to the table. What does not fit into `minutes` is listed with the command that runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments import _jobs
from nanochat import config as configs
from nanochat import distributed, model
from nanochat.config import NonNegativeInt, PositiveFloat, PositiveInt, Settings, UserError
from nanochat.distributed import ShardingConfig
from nanochat.text import format_count, table
from nanochat.train import StageConfig, TrainConfig

LAPTOP = {"vocab_size": 4096, "sequence_len": 512, "head_dim": 64, "window_pattern": "L"}  # at depth 4, batch 8
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NOTE = "record what is worth keeping, with date, machine and commit, in experiments/RESULTS.md"


@dataclasses.dataclass(frozen=True)
class GpuConfig(Settings):
    """Units of suite=gpu; the defaults are for an H100 or H200.

    Attributes:
        units: names or beginnings of the units to run (tests, limits, train, train:auto, train:auto:fp8, decode,
            members, kernels); default: all.
        out: folder of the results: bench_gpu.jsonl, the table bench_gpu.md, the output of each unit, traces; default:
            $OUT, else runs/bench_gpu.
        unit_seconds: time limit of each unit.
        kernel: attention kernel of the first training units, which do not try others before they measure.
        batches: micro-batch sizes to try, the largest that fits is timed.
        step_tokens: tokens of a step, reached by gradient accumulation.
        tests: file of the tests; default: all files with tests for a GPU.
    """

    units: tuple[str, ...] = ()
    out: str | None = None
    unit_seconds: PositiveFloat = 300.0
    kernel: str = "flash"
    batches: tuple[PositiveInt, ...] = (64, 32, 16, 8)
    step_tokens: PositiveInt = 2**19
    tests: str | None = None


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to measure.

    Attributes:
        what: one step, a sweep over configurations, scaling over ranks, limits, kernels, or many models in one step.
        suite: gpu: everything that needs one GPU, in the place of `what`, at most `minutes` long.
        dry_run: run the suite in tiny shapes, in this process, on any device.
        members: models in one step. chunk_sizes: how many of them are computed at once; default: what a sweep takes.
        depth: of the model, with pretrain's shape at that depth; default: a small shape for a laptop.
        width, head_dim, kv_heads, vocab_size, sequence_len, window_pattern: of the model; default: by depth.
        batch_size: sequences of a micro-batch on a rank; default: pretrain's.
        micro_batches: micro-batches of a step.
        rounds: of timing; 0: compile and stop.
        steps_per_round: steps timed in a round.
        compile: whether to use torch.compile.
        profile: whether to print the time by operation and the least possible, or with several ranks the share of
            communication.
        trace: file for the profile, .json or .json.gz, to open in perfetto; default: none.
        device, dtype: auto uses a GPU if there is one, and bfloat16 where it is fast.
        modes: of sharding, for a sweep or scaling; default: all, or sharding.mode if the sweep has other values.
        kernels, precisions, compiles: values of a sweep; default: all, or the configuration's if it has other values.
        cold: whether a sweep compiles with an empty cache first.
        ranks: numbers of ranks for scaling; default: 1, 2, 4, ... up to the GPUs of this machine, or its cores.
        scaling: kinds of scaling to measure.
        job_seconds: time limit of each job of a sweep or of scaling.
    """

    what: Literal["step", "sweep", "scaling", "limits", "kernels", "members"] = "step"
    suite: Literal["gpu"] | None = None
    minutes: PositiveFloat = 12.0
    dry_run: bool = False
    members: PositiveInt = 8
    chunk_sizes: tuple[PositiveInt, ...] = ()
    depth: PositiveInt | None = None
    width: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    sequence_len: PositiveInt | None = None
    window_pattern: str | None = None
    batch_size: PositiveInt | None = None
    micro_batches: PositiveInt = 1
    rounds: NonNegativeInt = 5
    steps_per_round: PositiveInt = 4
    compile: bool = True
    profile: bool = True
    trace: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    modes: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    precisions: tuple[Literal["bf16", "fp16", "fp32", "fp8"], ...] = ()
    compiles: tuple[bool, ...] = ()
    cold: bool = True
    ranks: tuple[PositiveInt, ...] = ()
    scaling: tuple[Literal["weak", "strong"], ...] = ("weak", "strong")
    job_seconds: PositiveInt = 900
    gpu: GpuConfig = GpuConfig()


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    from experiments import _bench, _gpu, _members

    what = f"suite={config.suite}" if config.suite else f"what={config.what}"
    if config.suite or config.what in ("scaling", "members"):
        distributed.require_single(runtime, what)
    resolved, shape = resolve(config)  # rejects an impossible shape before any job starts
    others = {"limits": _gpu.measure_limits, "kernels": _gpu.measure_kernels, "sweep": sweep, "scaling": scaling}
    if config.suite:
        _gpu.run(config, runtime)
    elif config.what in others:
        others[config.what](config, runtime)
    else:
        (_bench if config.what == "step" else _members).measure(resolved, shape, runtime)


def resolve(config: Config) -> tuple[Config, model.ModelConfig]:
    """Return the config with all numbers of the shape filled in, and the shape."""
    depth, batch_size, numbers = (4, 8, LAPTOP) if config.depth is None else (config.depth, StageConfig().rows, {})
    given = {name: getattr(config, name) for name in LAPTOP if getattr(config, name) is not None}
    try:
        shape = model.from_depth(depth, **(numbers | given))
        width = config.width or shape.n_embd
        if width % shape.head_dim:
            raise UserError(f"width={width}: must be a multiple of head_dim={shape.head_dim}")
        n_head = width // shape.head_dim
        shape = dataclasses.replace(shape, n_embd=width, n_head=n_head, n_kv_head=config.kv_heads or n_head)
    except ValueError as error:
        raise UserError(str(error)) from None
    full: dict[str, Any] = {name: getattr(shape, name) for name in LAPTOP}
    batch_size = config.batch_size or batch_size
    return dataclasses.replace(config, depth=depth, width=width, batch_size=batch_size, **full), shape


# Sweeps and scaling: one job for each configuration

JOBS_ONLY = ("what", "suite", "minutes", "modes", "kernels", "precisions", "compiles", "cold", "ranks", "scaling")
JOBS_ONLY += ("job_seconds", "gpu")
# Column of a table -> its text for the result of a job
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
    "MFU": lambda r: f"{r['mfu']:.1%}",
    "of matmul": lambda r: f"{r['share_of_largest_matmul']:.1%}",
    "x predicted": lambda r: f"{r['step_seconds'] / r['predicted_seconds']:.2f}",
    "peak GiB": lambda r: f"{r['peak_memory_bytes'] / distributed.GIB:.2f}",
    "planned GiB": lambda r: f"{r['planned_bytes'] / distributed.GIB:.2f}",
    "communication": lambda r: f"{r['communication_share']:.1%}",
    "exposed": lambda r: f"{r['communication_exposed_share']:.1%}",
    "efficiency": lambda r: f"{r['efficiency']:.1%}",
    "sent B": lambda r: f"{r['sent_bytes']:.3g}",
    "expected B": lambda r: f"{r['sent_bytes_expected']:.3g}",
    "cold s": lambda r: f"{r['compile_cold_seconds']:.0f}",
    "warm s": lambda r: f"{r['compile_warm_seconds']:.0f}",
    "compile s": lambda r: f"{r['compile_seconds']:.0f}",
}
SWEEP_COLUMNS = ("tokens/s", "MFU", "of matmul", "peak GiB", "communication", "exposed", "cold s", "warm s")
SCALING_COLUMNS = ("tokens/s", "efficiency", "sent B", "expected B", "communication", "exposed", "peak GiB")


def changed_settings(config: Config, group: str = "") -> dict[str, Any]:
    """Return the settings that differ from the defaults, by dotted name: of a step, or of a group."""
    defaults = dict(configs.flatten(Config()))
    settings = {name: value for name, value in configs.flatten(config) if value != defaults[name]}
    groups = {name: name.split(".")[0] for name in settings}
    return {n: v for n, v in settings.items() if (groups[n] == group if group else groups[n] not in JOBS_ONLY)}


def run_job(
    config: Config, changes: Mapping[str, Any], ranks: int, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Measure with `changes` by dotted name in a job of `ranks` ranks; return the numbers, and `error` or None."""
    command = _jobs.launch_command("bench_train", changed_settings(config) | dict(changes), ranks)
    outcome = _jobs.run_subprocess(command, seconds=config.job_seconds, env=env)
    return {**(outcome.result or {}), "error": outcome.error or None}


def results_table(results: Sequence[Mapping[str, Any]], labels: Sequence[str], columns: Sequence[str]) -> str:
    """Return the results of jobs as text; dashes for numbers that were not measured."""

    def cell(result: Mapping[str, Any], column: str) -> str:
        try:
            return COLUMNS[column](result)
        except KeyError:
            return "-"

    rows = [[*(str(row[label]) for label in labels), *(cell(row, column) for column in columns)] for row in results]
    return table([[*labels, *columns], *rows])


def sweep(config: Config, runtime: distributed.Runtime) -> None:
    """Measure every combination in jobs of as many ranks as this one, and print a table."""
    if runtime.world_size > runtime.node_ranks:
        raise UserError("a sweep runs on one node: start it with --nnodes=1, or measure one configuration")
    if not runtime.is_main:
        return  # the jobs start their own ranks
    cases, rows = combinations(config, runtime), []
    print(f"{len(cases)} configurations on {runtime.world_size} ranks, each in a job of its own", flush=True)
    for case in cases:
        result = run_combination(config, case, runtime.world_size)
        row = {"ranks": runtime.world_size, **case, **result, "bench": "train_sweep"}
        if case["compile"] and not row["error"]:
            row["compile_warm_seconds"] = row["compile_seconds"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    peak_from = distributed.peak_flops(runtime.device, runtime.compute_dtype)[1]
    print(f"\nMFU: of {peak_from}; of matmul: of the largest one measured")
    print(results_table([row | case for row, case in zip(rows, cases)], list(cases[0]), SWEEP_COLUMNS))
    for row, case in zip(rows, cases):
        if row["error"]:
            print(f"  failed: {', '.join(map(str, case.values()))}: {row['error']}")
    print(NOTE)


def combinations(config: Config, runtime: distributed.Runtime) -> list[dict[str, Any]]:
    from experiments import _bench

    gpu, several = runtime.device.type == "cuda", runtime.world_size > 1
    everything = not (config.modes or config.kernels or config.precisions or config.compiles)
    modes, kernels, compiles = (config.sharding.mode,), (config.train.attention,), (config.compile,)
    precisions: tuple[str, ...] = (_bench.precision(config, runtime),)
    if everything:
        modes, compiles = ("replicate", "zero2", "fsdp"), (True, False)
        kernels = ("auto", "fa3", "flash", "flex", "sdpa") if gpu else ("sdpa", "math")
        precisions = ("bf16", "fp8") if gpu else precisions
    columns = {
        "mode": (config.modes or modes) if several else ("single",),
        "kernel": config.kernels or kernels,
        "precision": config.precisions or precisions,
        "compile": config.compiles or compiles,
    }
    return [dict(zip(columns, values)) for values in itertools.product(*columns.values())]


def run_combination(config: Config, case: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Return the result of a combination, and the seconds of its first two steps with an empty compiler cache."""
    changes: dict[str, Any] = {"compile": case["compile"], "train.attention": case["kernel"]}
    if case["mode"] != "single":
        changes["sharding.mode"] = case["mode"]
    if case["precision"] == "fp8":
        changes["train.linear"] = "fp8"
    else:
        changes["dtype"] = PRECISIONS[case["precision"]]
    if not (case["compile"] and config.cold):
        return run_job(config, changes, ranks)
    with tempfile.TemporaryDirectory() as folder:
        env = {"TORCHINDUCTOR_CACHE_DIR": folder}
        cold = run_job(config, changes | {"rounds": 0}, ranks, env)
        if cold["error"]:
            return cold
        return run_job(config, changes, ranks, env) | {"compile_cold_seconds": cold["compile_seconds"]}


def scaling(config: Config, runtime: distributed.Runtime) -> None:
    """Run the same work on more ranks (strong) and more work on more ranks (weak), and print how they compare."""
    if config.rounds < 1:
        raise UserError("rounds=0: what=scaling needs at least 1")
    cpu, sizes = runtime.device.type != "cuda", scaling_ranks(config, runtime)
    env = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // sizes[-1], 1))} if cpu else {}
    print(f"jobs of {', '.join(map(str, sizes))} ranks on {runtime.device.type}" + (f", {env}" if env else ""))

    @functools.cache  # one rank shards nothing: measured once
    def job(mode: str, n: int, micro_batches: int) -> dict[str, Any]:
        return run_job(config, {"micro_batches": micro_batches} | ({"sharding.mode": mode} if n > 1 else {}), n, env)

    rows: list[dict[str, Any]] = []
    for kind, mode in itertools.product(config.scaling, config.modes or ("replicate", "zero2", "fsdp")):
        base = None
        for n in sizes:
            micro_batches = 1 if kind == "weak" else sizes[-1] // n
            result = job(mode if n > 1 else "single", n, micro_batches)
            row = {"kind": kind, "mode": mode, "ranks": n, "micro_batches": micro_batches}
            row |= {name: result[name] for name in SCALING_RESULTS if name in result}
            if not row["error"]:
                rate = row["tokens_per_second"] / n
                base = rate if n == sizes[0] else base
                row |= {"efficiency": rate / base} if base else {}
            rows.append(row)
            text = row["error"] or f"{format_count(row['tokens_per_second'])} tokens/s"
            print(f"  {kind}, {mode}, {n} ranks: {text}", flush=True)
    print(results_table(rows, ("kind", "mode", "ranks", "micro_batches"), SCALING_COLUMNS))
    print(f"efficiency: tokens/s of a rank against a job of {sizes[0]}; sent: by one rank in a step")
    print(NOTE)
    print(json.dumps({"bench": "scaling", **dataclasses.asdict(config), "ranks": sizes, "results": rows}))


SCALING_RESULTS = ("error", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes", "sent_bytes")
SCALING_RESULTS += ("sent_bytes_expected", "communication_share", "communication_exposed_share")


def scaling_ranks(config: Config, runtime: distributed.Runtime) -> list[int]:
    import torch

    most = torch.cuda.device_count() if runtime.device.type == "cuda" else os.cpu_count() or 1
    sizes = sorted(set(config.ranks)) or [2**i for i in range(most.bit_length()) if 2**i <= most]
    if runtime.device.type == "cuda" and sizes[-1] > most:
        raise UserError(f"ranks={sizes[-1]}: this machine has {most} GPUs")
    if "strong" in config.scaling and (odd := [n for n in sizes if sizes[-1] % n]):
        raise UserError(f"ranks={odd[0]}: must divide {sizes[-1]}, or set scaling=weak")
    return sizes
