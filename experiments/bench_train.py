r"""Measure the training step: tokens/s, FLOP utilisation and memory, beside the machine's matmul ceiling.

    torchrun launch.py --experiment=bench_train                          # a small shape, for a laptop
    torchrun launch.py --experiment=bench_train --set depth=20           # the shape that pretrain has at a depth
    torchrun --nproc_per_node=8 launch.py --experiment=bench_train --set depth=20 --set sharding.mode=fsdp
    torchrun --nproc_per_node=8 launch.py --experiment=bench_train --set depth=20 --set modes=replicate,zero2,fsdp \
        --set kernels=auto,flex --set precisions=bf16,fp8 --set compiles=true,false      # a sweep

One configuration: the full step is timed (forward, backward, Muon and AdamW), in rounds that alternate with a large
square matmul, so that both see the same machine. Prints a table, a profile by kind of operation, and one JSON line; the
small shape takes about two minutes on two CPU cores, most of it compiling.

A sweep (any of modes, kernels, precisions and compiles with values, or sweep=true for all of them): every combination
is a job of its own on as many ranks as this one has, on one node; where it is compiled, first with an empty compiler
cache and then with a warm one. Prints a JSON line for each and a table at the end; a configuration that fails gets a
line that says why. Count two to three minutes for each on a GPU.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments import _bench, _trace, pretrain
from experiments._bench import RunResult as Outcome
from experiments._bench import TrainStepBench as Subject
from experiments._bench import timed
from nanochat import config as configs
from nanochat import distributed, model
from nanochat.config import UserError
from nanochat.distributed import Runtime, ShardingConfig
from nanochat.model import ModelConfig
from nanochat.train import StageConfig, TrainConfig, planner

ROOT = Path(__file__).resolve().parents[1]
LAPTOP = {
    "depth": 4,
    "width": 256,
    "head_dim": 64,
    "vocab_size": 4096,
    "sequence_len": 512,
    "batch_size": 8,
    "window_pattern": "L",
}
MATMUL_ROWS = 32768  # of the model's own products on a GPU: more are no faster, and need memory
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model and of the measurement.

    Attributes:
        depth: none is a small shape for a laptop; a number is pretrain's shape of that depth.
        width, head_dim, kv_heads, vocab_size, sequence_len, window_pattern: none is what follows from depth.
        batch_size: rows of a micro-batch on a rank. micro_batches: of a step.
        rounds, steps_per_round: of timing; no rounds: compile and stop.
        profile: where the time goes, by operation; on several ranks how much of it in communication.
        modes, kernels, precisions (bf16, fp16, fp32, fp8), compiles: values of a sweep; none: this configuration's.
        sweep: over all values of what has none. cold: in a sweep, compile with an empty cache first.
        job_seconds: after which a job of a sweep is stopped.
    """

    depth: int | None = None
    width: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    vocab_size: int | None = None
    sequence_len: int | None = None
    batch_size: int | None = None
    micro_batches: int = 1
    window_pattern: str | None = None
    rounds: int = 5
    steps_per_round: int = 4
    compile: bool = True
    profile: bool = True
    device: str = "auto"
    dtype: str = "auto"
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    sweep: bool = False
    modes: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    compiles: tuple[bool, ...] = ()
    cold: bool = True
    job_seconds: int = 900

    def __post_init__(self) -> None:
        for name, least in {"micro_batches": 1, "rounds": 0, "steps_per_round": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        known = (*PRECISIONS, "fp8")
        if wrong := set(self.precisions) - set(known):
            raise UserError(f"precisions={','.join(sorted(wrong))}: expected some of {', '.join(known)}")


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, here: Runtime) -> None:
    """Measure, and print what was measured."""
    config, shape = resolve(config)
    if config.sweep or config.modes or config.kernels or config.precisions or config.compiles:
        return sweep(config, here)
    it, result = one(config, shape, here)
    for key, value in result.items():
        print(f"  {key:32}{value:.4g}" if isinstance(value, float) else f"  {key:32}{value}")
    if config.profile and config.rounds:
        print("where the time of a step goes, by operation:")
        print("\n".join(_trace.breakdown(functools.partial(it.step, it.state), here)))
    print(json.dumps({"bench": "train", **dataclasses.asdict(config), **result}))


def resolve(config: Config) -> tuple[Config, ModelConfig]:
    """Return the configuration with all numbers of the shape, and the shape.

    Raises:
        UserError: the shape is impossible.
    """
    usual: dict[str, Any] = dict(LAPTOP)
    if config.depth is not None:
        rule = pretrain.ShapeConfig()
        head_dim = config.head_dim or rule.head_dim
        try:
            shape = model.from_depth(config.depth, aspect_ratio=rule.aspect_ratio, head_dim=head_dim)
        except ValueError as error:
            raise UserError(str(error)) from None
        usual |= {"width": shape.n_embd, "head_dim": head_dim, "vocab_size": shape.vocab_size}
        usual |= {"sequence_len": rule.sequence_len, "window_pattern": rule.window_pattern}
        usual |= {"batch_size": StageConfig().rows}
    given = {name: getattr(config, name) for name in usual if getattr(config, name) is not None}
    full = usual | given
    if full["head_dim"] < 1 or full["width"] % full["head_dim"]:
        raise UserError(f"width={full['width']}: must be a multiple of head_dim={full['head_dim']}")
    n_head = full["width"] // full["head_dim"]
    try:
        shape = ModelConfig(
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


def precision_of(config: Config, here: Runtime) -> str:
    """Return bf16, fp16, fp32 or fp8: what the large products of this configuration are computed in."""
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    fp8 = config.train.linear == "fp8"
    return "fp8" if fp8 else names[str(here.compute_dtype).removeprefix("torch.")]


def one(config: Config, shape: ModelConfig, here: Runtime) -> tuple[Subject, dict[str, Any]]:
    """Measure a resolved configuration; print what it is, and return the step and what was measured."""
    tokens = config.batch_size * config.sequence_len * config.micro_batches * here.world_size  # pyright: ignore
    flops = model.flops_per_token(shape)
    settings = StageConfig(
        compile=config.compile,
        train=config.train,
        sharding=config.sharding,
        device_batch_size=config.batch_size or 1,
    )
    it = _bench.make_train_step(settings, shape, here, config.micro_batches)
    name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else here.device.type
    print(f"depth {config.depth}, width {config.width}, {model.count(shape)['total']:,} parameters")
    micro = f" x {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
    print(f"{flops / 1e6:.4g} MFLOP per token, batch {config.batch_size} x {config.sequence_len} tokens{micro}")
    print(f"{name}, {here.compute_dtype}, {it.kernels}, compile={config.compile}", flush=True)
    if it.layout:
        print(f"{here.world_size} ranks, {it.layout.mode}: mesh of {it.layout.replicas} x {it.layout.shards}")
    start = time.perf_counter()
    it = it._replace(state=it.step(it.step(it.state)))
    distributed.synchronize(here.device)
    compile_seconds = time.perf_counter() - start
    print(f"first two steps, with compilation: {compile_seconds:.1f} s", flush=True)
    result: dict[str, Any] = {
        "ranks": here.world_size,
        "mode": it.layout.mode if it.layout else "single",
        "precision": precision_of(config, here),
        "attention": it.kernels,
        "compile_seconds": compile_seconds,
    }
    if not config.rounds:
        return it, result
    peak_memory_bytes = distributed.all_reduce_max(
        distributed.peak_memory_bytes(here.device)
    )  # before the operands of the matmuls
    seconds, squares, shapes = alternate(config, shape, it, here)
    limit, limit_from = distributed.peak_flops(here.device, here.compute_dtype)
    speed = flops * tokens / seconds / here.world_size
    numbers: dict[str, Any] = {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "model_flops_per_second": speed,
    }
    for size, value in squares.items():
        square = 2 * size**3 / value
        numbers |= {f"matmul_{size}_flops_per_second": square, f"share_of_matmul_{size}": speed / square}
    numbers |= {
        "seconds_of_its_matmuls_alone": shapes,
        "share_of_step_for_its_matmuls": shapes / seconds,
        "mfu": speed / limit,
        "mfu_limit": limit_from,
        "peak_memory_bytes": peak_memory_bytes,
    }
    if it.layout and config.profile:
        numbers |= communication(config, shape, it, here)
    return it, numbers | result


def alternate(config: Config, shape: ModelConfig, it: Subject, here: Runtime) -> tuple[float, dict[int, float], float]:
    """Return median seconds of a step, of square matmuls by size, and of the model's own matmuls, taken in turns."""
    sizes = (2048, 8192) if here.device.type == "cuda" else (2048,)
    pairs = {n: [torch.randn(n, n, device=here.device).to(here.compute_dtype) for _ in range(2)] for n in sizes}
    tokens = (config.batch_size or 1) * shape.sequence_len * config.micro_batches
    rows = min(tokens, MATMUL_ROWS) if here.device.type == "cuda" else tokens
    own = _bench.matmuls(shape, rows, here)
    steps: list[float] = []
    squares: dict[int, list[float]] = {n: [] for n in sizes}
    shapes: list[float] = []
    for _ in range(config.rounds):
        for n, (a, b) in pairs.items():
            squares[n] += [timed(functools.partial(torch.matmul, a, b), here) for _ in range(5)]
        steps += [timed(lambda: it.step(it.state), here) for _ in range(config.steps_per_round)]
        shapes.append(timed(own, here) * tokens / rows)
    medians = {n: statistics.median(values) for n, values in squares.items()}
    return statistics.median(steps), medians, statistics.median(shapes[1:] or shapes)


def communication(config: Config, shape: ModelConfig, it: Subject, here: Runtime) -> dict[str, Any]:
    """Return the time of a profiled step in collectives, and the bytes that this rank sent, beside the expected."""
    assert it.layout is not None
    trace = _trace.trace(lambda: it.step(it.state), here, shapes=True)
    found = _trace.communication(trace)
    numbers: dict[str, Any] = {
        "profiled_step_seconds": trace.seconds,
        "communication_seconds": found.seconds,
        "communication_exposed_seconds": found.exposed_seconds,
        "communication_share": found.seconds / trace.seconds,
        "communication_exposed_share": found.exposed_seconds / trace.seconds,
    }
    try:
        numbers["sent_bytes"] = sum(_trace.sent_bytes(trace, it.layout).values())
    except LookupError as error:
        print(f"bytes on the wire: not known ({error})")
    if it.layout.whole or (config.compile and it.layout.gather == "layer"):  # what the planner's figures are of
        setup = planner.Setup(it.layout.mode, here.world_size, it.layout.shards, here.compute_dtype)
        expected = planner.traffic(shape, setup, micro_batches=config.micro_batches)
        numbers["sent_bytes_expected"] = sum(expected.values())
    return numbers


# Sweeps


def cases(config: Config, here: Runtime) -> list[dict[str, Any]]:
    """Return the settings of every combination that a sweep asks for, by the names of its columns."""
    gpu, everything = here.device.type == "cuda", config.sweep
    modes, kernels, compiles = config.modes, config.kernels, config.compiles
    if here.world_size == 1:
        modes = ("single",)
    elif everything and not modes:
        modes = ("replicate", "zero2", "fsdp")
    if everything:
        kernels = kernels or (("auto", "fa3", "flash", "flex", "sdpa") if gpu else ("sdpa", "math"))
        compiles = compiles or (True, False)
    usual = precision_of(config, here)
    precisions = config.precisions or (("bf16", "fp8") if everything and gpu else (usual,))
    columns = {
        "mode": modes or (config.sharding.mode,),
        "kernel": kernels or (config.train.attention,),
        "precision": precisions,
        "compile": compiles or (config.compile,),
    }
    return [dict(zip(columns, values)) for values in itertools.product(*columns.values())]


def sweep(config: Config, here: Runtime) -> None:
    """Measure every combination in jobs of as many ranks as this one, and print a table."""
    if here.world_size > here.node_ranks:
        raise UserError("a sweep starts its jobs on one node: start it with --nnodes=1, or measure one configuration")
    if not here.is_main:
        return  # the jobs bring their own ranks
    todo, rows, problems = cases(config, here), [], []
    print(f"{len(todo)} configurations on {here.world_size} ranks, each in a job of its own", flush=True)
    for case in todo:
        outcome, cold_seconds = measured(config, case, here.world_size)
        result = dict(outcome.result or {})
        line = {"ranks": here.world_size, **case, **result, "bench": "train_sweep"}
        line |= {"compile_cold_seconds": cold_seconds, "problem": outcome.problem or None}
        print(json.dumps(line), flush=True)
        rows.append([*map(str, case.values()), *cells(result, cold_seconds)])
        problems += [f"{', '.join(map(str, case.values()))}: {outcome.problem}"] * bool(outcome.problem)
    header = ["mode", "kernel", "precision", "compile", "tokens/s", "MFU", "of matmul", "peak GiB"]
    header += ["communication", "exposed", "cold s", "warm s"]
    peak_from = distributed.peak_flops(here.device, here.compute_dtype)[1]
    print(f"\nMFU: of {peak_from}; of matmul: of the largest one measured")
    print(_bench.table([header, *rows]))
    print("\n".join(["did not run:", *(f"  {line}" for line in problems)] if problems else ["all of them ran"]))
    print("note what is worth keeping, with date, machine and commit, in experiments/RESULTS.md")


def cells(result: Mapping[str, Any], cold_seconds: float | None) -> list[str]:
    """Return the measured columns of a row; dashes where there is nothing."""

    def text(key: str, form: str, scale: float = 1) -> str:
        return format(result[key] * scale, form) if key in result else "-"

    share = max((key for key in result if key.startswith("share_of_matmul_")), key=lambda k: int(k[16:]), default="-")
    return [
        text("tokens_per_second", ",.0f"),
        text("mfu", ".1%"),
        text(share, ".1%"),
        text("peak_memory_bytes", ".2f", 2**-30),
        text("communication_share", ".1%"),
        text("communication_exposed_share", ".1%"),
        "-" if cold_seconds is None else f"{cold_seconds:.0f}",
        text("compile_seconds", ".0f") if result.get("compile") else "-",
    ]


def measured(config: Config, case: Mapping[str, Any], ranks: int) -> tuple[Outcome, float | None]:
    """Return how the job of a combination ended, and the seconds of its first two steps with an empty cache."""
    changes: dict[str, Any] = {"compile": case["compile"], "train.attention": case["kernel"]}
    if case["mode"] != "single":
        changes["sharding.mode"] = case["mode"]
    if case["precision"] == "fp8":
        changes["train.linear"] = "fp8"
    elif case["precision"] in PRECISIONS:
        changes["dtype"] = PRECISIONS[case["precision"]]
    with tempfile.TemporaryDirectory() as folder:
        # A folder for every configuration: the cold numbers are cold, and the warm ones have seen this graph once.
        env, cold = {"TORCHINDUCTOR_CACHE_DIR": folder}, None
        if case["compile"] and config.cold:
            first = start(config, changes | {"rounds": 0}, ranks, env)
            if first.result is None:
                return first, None
            cold = float(first.result["compile_seconds"])
        return start(config, changes, ranks, env if cold else None), cold


SWEEP_ONLY = ("sweep", "modes", "kernels", "precisions", "compiles", "cold", "job_seconds")


def start(config: Config, changes: Mapping[str, Any], ranks: int, env: Mapping[str, str] | None = None) -> Outcome:
    """Run one configuration as a job of `ranks` ranks: this one with `changes` by dotted name."""
    plain = dict(configs.flatten(Config()))
    values = {n: v for n, v in configs.flatten(config) if n not in SWEEP_ONLY and v != plain[n]} | dict(changes)
    words = _bench.launch_command(ROOT / "launch.py", "bench_train", values, ranks)
    return _bench.run_subprocess(words, seconds=config.job_seconds, env=env)
