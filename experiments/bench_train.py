r"""Measure the training step: tokens/s, FLOP utilization and memory, beside the machine's matmul limit.

    python launch.py --experiment=bench_train                            # a small shape, for a laptop
    python launch.py --experiment=bench_train --set depth=20             # the shape that pretrain has at a depth
    torchrun --nproc_per_node=8 launch.py --experiment=bench_train --set depth=20 --set sharding.mode=fsdp
    torchrun --nproc_per_node=8 launch.py --experiment=bench_train --set what=sweep --set depth=20 \
        --set modes=replicate,zero2,fsdp --set precisions=bf16,fp8
    python launch.py --experiment=bench_train --set what=scaling --set depth=20      # all GPUs of this machine
    python launch.py --experiment=bench_train --set what=gpu                         # checks and times one GPU
    python launch.py --experiment=bench_train --set what=gpu --set device=cpu ...    # dry run on CPU

what=step: one configuration. The full step is timed (forward, backward, Muon and AdamW), in rounds that alternate with
large square matmuls, so that both see the same machine. Prints a table, a profile by kind of operation, and one JSON
line. Two minutes for the small shape on two CPU cores, most of it compiling.

what=sweep: every combination of modes, kernels, precisions and compiles, each in a job on as many ranks as this one
has; if compiled, first with an empty compiler cache and then with a warm one. Two to three minutes each on a GPU.

what=scaling: jobs of 1, 2, 4, ... ranks. Weak scaling: every rank has one micro-batch. Strong scaling: a step has as
many tokens as in the largest job, and fewer ranks accumulate over more micro-batches. On the CPU all jobs have the same
number of threads a rank. One to three minutes for every mode and number of ranks.

what=kernels: limits of the machine beside its data sheet, linear layers in both precisions, attention by window.

what=gpu: everything that needs one GPU, in units that run one after the other, the most important first: pytest -m gpu,
the training step of each depth in both precisions with a profile, what=kernels, bench_infer. What fails or takes too
long does not stop the rest; what did not fit into gpu.minutes is listed with the command that runs it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments import _jobs, pretrain
from nanochat import config as configs
from nanochat import distributed, model
from nanochat.config import UserError, require_at_least
from nanochat.distributed import ShardingConfig
from nanochat.text import format_count, table
from nanochat.train import StageConfig, TrainConfig

LAPTOP = {
    "depth": 4,
    "width": 256,
    "head_dim": 64,
    "vocab_size": 4096,
    "sequence_len": 512,
    "batch_size": 8,
    "window_pattern": "L",
}
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NOTE = "record what is worth keeping, with date, machine and commit, in experiments/RESULTS.md"


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """Units of what=gpu; the defaults are for an H100 or H200.

    Attributes:
        units: names or beginnings of the units to run (tests, train, train:20, train:20:fp8, kernels, decode);
            default: all.
        out: folder of the results: bench_gpu.jsonl, the output of each unit, traces; default: $OUT, else
            runs/bench_gpu.
        minutes: time limit for everything.
        unit_seconds: time limit of each unit.
        depths: of the models whose training step is timed, the most important first.
        batches: micro-batch sizes to try, the largest that fits is timed.
        step_tokens: tokens of a step, reached by gradient accumulation.
        tests: file or folder of the tests.
    """

    units: tuple[str, ...] = ()
    out: str | None = None
    minutes: float = 8.5
    unit_seconds: float = 300.0
    depths: tuple[int, ...] = (20, 24, 12)
    batches: tuple[int, ...] = (64, 32, 16, 8)
    step_tokens: int = 2**19
    tests: str = "tests"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        what: one step, a sweep over configurations, scaling over ranks, kernels, or everything that needs one GPU.
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

    what: Literal["step", "sweep", "scaling", "kernels", "gpu"] = "step"
    depth: int | None = None
    width: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    vocab_size: int | None = None
    sequence_len: int | None = None
    window_pattern: str | None = None
    batch_size: int | None = None
    micro_batches: int = 1
    rounds: int = 5
    steps_per_round: int = 4
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
    ranks: tuple[int, ...] = ()
    scaling: tuple[Literal["weak", "strong"], ...] = ("weak", "strong")
    job_seconds: int = 900
    gpu: GpuConfig = GpuConfig()

    def __post_init__(self) -> None:
        require_at_least(self, micro_batches=1, rounds=0, steps_per_round=1, batch_size=1)
        if wrong := [n for n in self.ranks if n < 1]:
            raise UserError(f"ranks={wrong[0]}: must be at least 1")


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    from experiments import _gpu

    runs = {"step": measure_step, "sweep": sweep, "scaling": scaling, "kernels": _gpu.measure_kernels, "gpu": _gpu.run}
    resolve(config)  # rejects an impossible shape before any job starts
    runs[config.what](config, runtime)


def measure_step(config: Config, runtime: distributed.Runtime) -> None:
    from experiments import _bench, _trace

    config, shape = resolve(config)
    step, result = _bench.measure(config, shape, runtime)
    for key, value in result.items():
        print(f"  {key:32}{value:.4g}" if isinstance(value, float) else f"  {key:32}{value}")
    if config.profile and config.rounds:
        path = Path(config.trace) if config.trace else None
        result |= _trace.print_profile(step, runtime, result["step_seconds"], path)
    print(json.dumps({"bench": "train", **dataclasses.asdict(config), **result}))


def resolve(config: Config) -> tuple[Config, model.ModelConfig]:
    """Return the config with all numbers of the shape filled in, and the shape."""
    full: dict[str, Any] = dict(LAPTOP)
    try:
        if config.depth is not None:
            rule = pretrain.ShapeConfig()
            full = {"depth": config.depth, "head_dim": config.head_dim or rule.head_dim}
            shape = model.from_depth(config.depth, aspect_ratio=rule.aspect_ratio, head_dim=full["head_dim"])
            full |= {"width": shape.n_embd, "vocab_size": shape.vocab_size, "sequence_len": rule.sequence_len}
            full |= {"window_pattern": rule.window_pattern, "batch_size": StageConfig().rows}
        full |= {name: getattr(config, name) for name in full if getattr(config, name) is not None}
        if full["head_dim"] < 1 or full["width"] % full["head_dim"]:
            raise UserError(f"width={full['width']}: must be a multiple of head_dim={full['head_dim']}")
        n_head = full["width"] // full["head_dim"]
        shape = model.ModelConfig(
            sequence_len=full["sequence_len"],
            vocab_size=full["vocab_size"],
            n_layer=full["depth"],
            n_head=n_head,
            n_kv_head=config.kv_heads or n_head,
            n_embd=full["width"],
            window_pattern=full["window_pattern"],
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return dataclasses.replace(config, **full), shape


# Sweeps and scaling: one job for each configuration

JOBS_ONLY = ("what", "modes", "kernels", "precisions", "compiles", "cold", "ranks", "scaling", "job_seconds", "gpu")
COLUMNS = {
    "tokens/s": ("tokens_per_second", ",.0f"),
    "MFU": ("mfu", ".1%"),
    "of matmul": ("share_of_matmul", ".1%"),
    "peak GiB": ("peak_memory_gib", ".2f"),
    "communication": ("communication_share", ".1%"),
    "exposed": ("communication_exposed_share", ".1%"),
    "efficiency": ("efficiency", ".1%"),
    "sent B": ("sent_bytes", ".3g"),
    "expected B": ("sent_bytes_expected", ".3g"),
    "cold s": ("compile_cold_seconds", ".0f"),
    "warm s": ("compile_warm_seconds", ".0f"),
    "x predicted": ("step_over_prediction", ".2f"),
    "planned GiB": ("planned_gib", ".2f"),
    "compile s": ("compile_seconds", ".0f"),
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
) -> _jobs.RunResult:
    """Run one configuration in a job of `ranks` ranks: this one with `changes` by dotted name."""
    command = _jobs.launch_command("bench_train", changed_settings(config) | dict(changes), ranks)
    return _jobs.run_subprocess(command, seconds=config.job_seconds, env=env)


def results_table(results: Sequence[Mapping[str, Any]], labels: Sequence[str], columns: Sequence[str]) -> str:
    """Return the results of jobs as text; dashes for numbers that were not measured."""
    rows = [[*labels, *columns]]
    for result in map(derived, results):
        cells = [(result.get(key), form) for key, form in map(COLUMNS.__getitem__, columns)]
        rows.append([*(str(result[label]) for label in labels)])
        rows[-1] += ["-" if value is None else format(value, form) for value, form in cells]
    return table(rows)


def derived(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job's result with the numbers that only tables need."""
    numbers = dict(result)
    if shares := [name for name in result if name.startswith("share_of_matmul_")]:
        numbers["share_of_matmul"] = result[max(shares, key=lambda name: int(name.rsplit("_")[-1]))]
    for name in ("peak_memory", "planned"):
        if f"{name}_bytes" in result:
            numbers[f"{name}_gib"] = result[f"{name}_bytes"] / distributed.GIB
    if "predicted_seconds" in result:
        numbers["step_over_prediction"] = result["step_seconds"] / result["predicted_seconds"]
    if result.get("compile"):
        numbers["compile_warm_seconds"] = result.get("compile_seconds")
    return numbers


def sweep(config: Config, runtime: distributed.Runtime) -> None:
    """Measure every combination in jobs of as many ranks as this one, and print a table."""
    if runtime.world_size > runtime.node_ranks:
        raise UserError("a sweep runs on one node: start it with --nnodes=1, or measure one configuration")
    if not runtime.is_main:
        return  # the jobs start their own ranks
    cases, rows = combinations(config, runtime), []
    print(f"{len(cases)} configurations on {runtime.world_size} ranks, each in a job of its own", flush=True)
    for case in cases:
        outcome, cold_seconds = run_combination(config, case, runtime.world_size)
        row = {"ranks": runtime.world_size, **case, **(outcome.result or {}), "bench": "train_sweep"}
        row |= {"compile_cold_seconds": cold_seconds, "error": outcome.error or None}
        print(json.dumps(row), flush=True)
        rows.append(row | case)
    peak_from = distributed.peak_flops(runtime.device, runtime.compute_dtype)[1]
    print(f"\nMFU: of {peak_from}; of matmul: of the largest one measured")
    print(results_table(rows, list(cases[0]), SWEEP_COLUMNS))
    for row, case in zip(rows, cases):
        if row["error"]:
            print(f"  failed: {', '.join(map(str, case.values()))}: {row['error']}")
    print(NOTE)


def combinations(config: Config, runtime: distributed.Runtime) -> list[dict[str, Any]]:
    """Return the settings of every combination of a sweep, by the names of its columns."""
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


def run_combination(config: Config, case: Mapping[str, Any], ranks: int) -> tuple[_jobs.RunResult, float | None]:
    """Return the result of a combination, and the seconds of its first two steps with an empty compiler cache."""
    changes: dict[str, Any] = {"compile": case["compile"], "train.attention": case["kernel"]}
    if case["mode"] != "single":
        changes["sharding.mode"] = case["mode"]
    if case["precision"] == "fp8":
        changes["train.linear"] = "fp8"
    else:
        changes["dtype"] = PRECISIONS[case["precision"]]
    if not (case["compile"] and config.cold):
        return run_job(config, changes, ranks), None
    with tempfile.TemporaryDirectory() as folder:
        env = {"TORCHINDUCTOR_CACHE_DIR": folder}
        cold = run_job(config, changes | {"rounds": 0}, ranks, env)
        if cold.result is None:
            return cold, None
        return run_job(config, changes, ranks, env), float(cold.result["compile_seconds"])


def scaling(config: Config, runtime: distributed.Runtime) -> None:
    """Run the same work on more ranks (strong) and more work on more ranks (weak), and print how they compare."""
    if runtime.world_size > 1:
        raise UserError("what=scaling starts its own jobs: start it without --nproc_per_node")
    if config.rounds < 1:
        raise UserError("rounds=0: what=scaling needs at least 1")
    cpu, sizes = runtime.device.type != "cuda", scaling_ranks(config, runtime)
    env = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // sizes[-1], 1))} if cpu else {}
    print(f"jobs of {', '.join(map(str, sizes))} ranks on {runtime.device.type}" + (f", {env}" if env else ""))
    done: dict[tuple[str, int, int], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for kind, mode in itertools.product(config.scaling, config.modes or ("replicate", "zero2", "fsdp")):
        base = None
        for n in sizes:
            micro_batches = 1 if kind == "weak" else sizes[-1] // n
            key = (mode if n > 1 else "single", n, micro_batches)  # one rank shards nothing: measured once
            if key not in done:
                changes = {"micro_batches": micro_batches} | ({"sharding.mode": mode} if n > 1 else {})
                outcome = run_job(config, changes, n, env)
                done[key] = {**(outcome.result or {}), "error": outcome.error or None}
            row = {"kind": kind, "mode": mode, "ranks": n, "micro_batches": micro_batches}
            row |= {name: done[key][name] for name in SCALING_RESULTS if name in done[key]}
            if "tokens_per_second" in row:
                rate = row["tokens_per_second"] / n
                base = rate if n == sizes[0] else base
                row["efficiency"] = rate / base if base else None
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
    """Return the numbers of ranks to measure, ascending."""
    import torch

    most = torch.cuda.device_count() if runtime.device.type == "cuda" else os.cpu_count() or 1
    sizes = sorted(set(config.ranks)) or [2**i for i in range(most.bit_length()) if 2**i <= most]
    if runtime.device.type == "cuda" and sizes[-1] > most:
        raise UserError(f"ranks={sizes[-1]}: this machine has {most} GPUs")
    if "strong" in config.scaling and (odd := [n for n in sizes if sizes[-1] % n]):
        raise UserError(f"ranks={odd[0]}: must divide {sizes[-1]}, or set scaling=weak")
    return sizes
