"""Plan a pretraining run without a GPU: memory by part, largest batch, traffic, time and cost, by mode and GPU.

    python launch.py --experiment=plan --set depth=20 --set world_size=8 --set gpu=h100
    python launch.py --experiment=plan --set depth=12 --set gpu=rtx3060
    python launch.py --experiment=plan --set fit=8gb            # the largest depth that fits, and how
    python launch.py --experiment=plan --set hours=24           # what common GPUs train in a day
    python launch.py --experiment=plan --set depth=32 --set world_size=32 --set gpu=h100 --set mode=hsdp

Takes seconds; nothing is allocated or downloaded. Prints parameters, tokens and FLOPs (exact), memory of a GPU by part
at the peak of a step, the largest device batch that fits, bytes sent, hours and cost, a table over depths and GPUs, and
the command to run next. Settings shared with --experiment=pretrain mean the same there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from experiments import _fit, pretrain
from nanochat import distributed, model, optim, train
from nanochat.config import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Settings,
    UserError,
    flatten,
    nearest,
)
from nanochat.text import format_count, format_duration, table

DEPTHS = (12, 16, 20, 24, 26, 30, 34)
SINGLE_GPUS = ("rtx3070", "rtx3060", "rtx4090", "rtx5090", "l40s", "a100-80gb", "h100", "h200", "b200")
EIGHT_GPUS = ("rtx3060", "rtx4090", "a100-80gb", "h100", "h200", "b200")
PREFERRED = ("zero2", "hsdp", "fsdp", "replicate")  # the command uses the first that fits
HALF = ("t4", "v100")  # GPUs without bfloat16: they compute in float16
CARDS = {  # of the table for `hours`: GPUs of the job by name
    **dict.fromkeys(("rtx3070", "rtx3060", "rtx4070", "t4", "m1-max", "rtx3090", "rtx4090", "a100-80gb"), (1,)),
    "h100": (1, 8),
}
SHARED = ("model", "total_batch_size", "num_iterations", "target_flops", "target_param_data_ratio")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to plan for.

    Attributes:
        depth, model, total_batch_size, num_iterations, target_flops, target_param_data_ratio: as for pretrain.
        world_size: GPUs of the job.
        gpu: type of GPU, a name of GPU_SPECS; auto: h100, or with fit the first of those with that memory.
        fit: GPU memory to fill, such as 8gb, or auto: all that gpu has. As in pretrain, the planner chooses the largest
            depth that fits, the batch, memory_budget and embedding_moments, where these have their defaults.
        memory_budget, embedding_moments: train.memory_budget and train.embedding_moments.
        gpus_per_node: GPUs that share a fast link.
        mode: sharding mode, or all of them.
        shard_ranks: ranks that share one copy of the state in hsdp; default: the GPUs of a node.
        device_batch_size: sequences of a micro-batch, or auto: the largest that fits.
        ema: keep an average of the weights (train.ema).
        fp8: matrix products in float8, which saves no time in this estimate unless mfu says so.
        mfu: share of the GPU's 16-bit peak that a step reaches.
        dollars_per_hour: price of one GPU; default: the table's.
        chunk_tokens: tokens whose logits the loss computes at once.
        lora: of a fine-tuning step on adapters in place of a pretraining step.
        table: whether to print the table over depths and GPUs.
        hours: print only a table, in Markdown, of what common GPUs train within so many hours, and the commands.
    """

    depth: PositiveInt | None = None
    fit: _fit.Fit | None = None
    world_size: PositiveInt = 1
    gpu: str = "auto"
    gpus_per_node: PositiveInt = 8
    mode: Literal["all", "replicate", "zero2", "fsdp", "hsdp"] = "all"
    shard_ranks: PositiveInt | None = None
    device_batch_size: PositiveInt | Literal["auto"] = "auto"
    memory_budget: Fraction = 1.0
    embedding_moments: Literal["float32", "bfloat16"] = "float32"
    ema: bool = False
    fp8: bool = False
    mfu: Annotated[float, "above 0, at most 1", lambda x: 0 < x <= 1] = 0.5
    dollars_per_hour: NonNegativeFloat | None = None
    chunk_tokens: PositiveInt = 8192
    table: bool = True
    hours: PositiveFloat | None = None
    total_batch_size: PositiveInt | None = None
    num_iterations: PositiveInt | None = None
    target_flops: PositiveFloat | None = None
    target_param_data_ratio: PositiveFloat = 12.0
    model: pretrain.ShapeConfig = pretrain.ShapeConfig()
    lora: train.LoraConfig = train.LoraConfig()

    @property
    def rows(self) -> int | None:
        """Sequences of a micro-batch, or None for the most that fit."""
        return None if self.device_batch_size == "auto" else self.device_batch_size


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    if config.hours:
        return print("\n".join(cards(config, config.hours)))
    config, gpu = choose_gpu(config, runtime)
    modes = sharding_modes(config)
    if config.fit:
        config = fitted(config, gpu, modes, runtime)
    depth = config.depth or pretrain.DEPTH
    config = dataclasses.replace(config, depth=depth)
    shape, plan = resolve(config, depth)
    for rows in {1, config.rows or 1}:  # refuses what does not divide
        optim.scaling.accumulation_steps(plan.total_batch_size, rows, shape.sequence_len, config.world_size)
    if not runtime.is_main:
        return
    print(f"plan: depth {config.depth} on {config.world_size} x {config.gpu} ({gpu.memory_gib:.4g} GiB each)\n")
    print(counts(shape, plan), flush=True)
    estimates = {mode: estimate(config, mode, shape, plan, gpu) for mode in modes}
    print("\nmemory of one GPU in GiB, at the peak of a step\n" + memory_table(config, shape, plan, gpu, estimates))
    if any(estimates.values()):
        print("\none step: bytes that a GPU sends, and time\n" + time_table(estimates))
    if config.table:
        legend = "device batch (z: zero2, f: fsdp), time and cost of the whole run; -: one row does not fit"
        print(f"\nall depths on other GPUs: {legend}\n{sweep(config)}", flush=True)
    print("\nassumed\n" + assumptions(config, gpu))
    print(f"\nnext: {command(config, estimates)}")


def choose_gpu(config: Config, runtime: distributed.Runtime) -> tuple[Config, distributed.GpuSpec]:
    """Return the settings with a type of GPU, and its row of the table, with the memory of `fit` if that is a size."""
    specs, size, name = distributed.GPU_SPECS, _fit.size_bytes(config.fit or ""), config.gpu.lower()
    if name == "auto" and config.fit and not size:
        name = _fit.device_name(runtime.device)
        found = [n for n, spec in specs.items() if spec is distributed.hardware.gpu_spec(name)]
        if not found:
            raise UserError(f"fit=auto: this device ({name}) is not in the table of GPUs: set gpu=rtx3060, or fit=8gb")
        name = found[0]
    elif name == "auto":
        enough = [n for n, spec in specs.items() if spec.memory_gib * 2**30 >= size]
        smallest = sorted(enough, key=lambda n: specs[n].memory_gib) if size else ["h100"]
        if not smallest:
            raise UserError(f"fit={config.fit}: no GPU of the table has so much memory; set gpu, or a smaller fit")
        name = smallest[0]
    if name not in specs:
        raise UserError(f"gpu={config.gpu}: not in GPU_SPECS of nanochat/distributed/hardware.py{nearest(name, specs)}")
    gpu = specs[name]._replace(memory_gib=size / 2**30) if size else specs[name]
    return dataclasses.replace(config, gpu=name), gpu


def fitted(config: Config, gpu: distributed.GpuSpec, modes: Sequence[str], runtime: distributed.Runtime) -> Config:
    """Return the settings that the planner chooses to fill the GPU's memory; they are printed."""
    mode = next(mode for mode in PREFERRED if mode in modes)
    base = pretrain.Config(
        depth=config.depth,
        fit=config.fit,
        device_batch_size=config.device_batch_size,
        train=train.TrainConfig(memory_budget=config.memory_budget, embedding_moments=config.embedding_moments),
    )
    resolve_depth = functools.partial(resolve, config)
    chosen = _fit.largest(base, step_setup(config, mode), int(gpu.memory_gib * 2**30), resolve_depth)
    if runtime.is_main:
        print(_fit.describe(chosen, str(config.fit), config.gpu, resolve_depth, config.mfu) + "\n", flush=True)
    changes = {name.removeprefix("train."): value for name, value in chosen.settings().items()}
    return dataclasses.replace(config, **changes, table=False)


def cards(config: Config, hours: float) -> list[str]:
    """Return a Markdown table: for each of CARDS the largest model of even depth that is trained within `hours`."""
    lines = ["| GPU | memory | command, after `launch.py --experiment=pretrain --set fit=auto` | tokens | time |"]
    lines.append("|---|---|---|---|---|")
    for name, world_size in [(name, n) for name, sizes in CARDS.items() for n in sizes]:
        here = dataclasses.replace(config, gpu=name, world_size=world_size)
        setup, gpu = step_setup(here, "replicate" if world_size == 1 else "zero2"), distributed.GPU_SPECS[name]
        best = None
        for depth in range(_fit.LEAST_DEPTH, _fit.MOST_DEPTH, 2):
            base = pretrain.Config(depth=depth, fit="auto", device_batch_size="auto")
            try:
                fitted = _fit.largest(base, setup, int(gpu.memory_gib * 2**30), functools.partial(resolve, here))
            except UserError:
                break
            cost = train.planner.estimate(
                fitted.shape, fitted.plan, gpu, fitted.choice.setup, mfu=config.mfu, rows=fitted.choice.rows
            )
            if not cost or cost.hours > hours:
                break
            best = fitted, cost
        if best:
            (shape, plan, *_), cost = best
            start = f"torchrun --nproc_per_node={world_size} …" if world_size > 1 else "python …"
            tokens, time = format_count(plan.total_tokens), format_duration(3600 * cost.hours)
            cells = [f"{world_size} x {name}", f"{gpu.memory_gib:g} GiB", f"`{start} --set depth={shape.n_layer}`"]
            lines.append(f"| {' | '.join([*cells, tokens, time])} |")
    if len(lines) == 2:
        raise UserError(f"hours={hours:g}: no GPU of the table trains depth {_fit.LEAST_DEPTH} in that time; set more")
    return lines


def sharding_modes(config: Config) -> Sequence[str]:
    """Return the modes to compare: one for a single GPU; hsdp only for several groups."""
    modes, shards = train.planner.MODES, config.shard_ranks or min(config.gpus_per_node, config.world_size)
    if config.mode in ("all", "hsdp") and config.world_size % shards:
        if config.mode == "hsdp" or config.shard_ranks:
            raise UserError(f"hsdp: groups of {shards} do not divide world_size={config.world_size}; set shard_ranks")
        return modes[:3]
    if config.mode != "all":
        return [config.mode]
    if config.world_size == 1:
        return ["replicate"]
    return modes if 1 < shards < config.world_size else modes[:3]


def resolve(config: Config, depth: int) -> tuple[model.ModelConfig, optim.Plan]:
    """Return model shape and plan at a depth, as pretrain does for the same settings."""
    shared = {name: getattr(config, name) for name in SHARED}
    return pretrain.resolve(dataclasses.replace(pretrain.Config(), **shared, depth=depth), None)


def step_setup(config: Config, mode: str) -> train.planner.Setup:
    return train.planner.Setup(
        mode,
        config.world_size,
        config.shard_ranks or min(config.gpus_per_node, config.world_size),
        dtype=distributed.DTYPES["float16" if config.gpu.lower() in HALF else "bfloat16"],
        fp8=config.fp8,
        ema=config.ema,
        memory_budget=config.memory_budget,
        embedding_moments=distributed.DTYPES[config.embedding_moments],
        chunk_tokens=config.chunk_tokens,
        node_ranks=config.gpus_per_node,
        lora_rank=config.lora.rank,
        lora_targets=config.lora.targets,
    )


def estimate(
    config: Config, mode: str, shape: model.ModelConfig, plan: optim.Plan, gpu: distributed.GpuSpec
) -> train.Estimate | None:
    setup, price = step_setup(config, mode), config.dollars_per_hour
    return train.planner.estimate(shape, plan, gpu, setup, mfu=config.mfu, rows=config.rows, dollars_per_hour=price)


def counts(shape: model.ModelConfig, plan: optim.Plan) -> str:
    """Return parameters by group, tokens, steps and FLOPs as text."""
    numbers = model.count(shape)
    groups = {name: n for name, n in numbers.items() if name not in ("total", "scaling")}
    facts = {
        "shape": f"{shape.n_layer} layers, width {shape.n_embd} = {shape.n_head} heads of {shape.head_dim}, "
        f"vocabulary {shape.vocab_size}, {shape.sequence_len} tokens of context",
        "step": f"{plan.total_batch_size:,} tokens",
        "run": f"{plan.num_steps:,} steps, {plan.total_tokens:,} tokens "
        f"({plan.total_tokens / numbers['scaling']:.2f} per scaling parameter)",
        "FLOPs": f"{plan.flops_per_token:,} a token, {plan.total_flops:.4g} in all",
    }
    rows = [[name.replace("_", " "), f"{n:,}"] for name, n in [*groups.items(), ("total", numbers["total"])]]
    return "\n".join(["parameters by group", table(rows), *(f"  {name:<8}{text}" for name, text in facts.items())])


def memory_table(
    config: Config,
    shape: model.ModelConfig,
    plan: optim.Plan,
    gpu: distributed.GpuSpec,
    estimates: Mapping[str, train.Estimate | None],
) -> str:
    """Return memory by part and mode; for a mode that does not fit, at the requested batch or one sequence."""
    rows_per_rank = plan.total_batch_size // (shape.sequence_len * config.world_size)
    columns, cells = [], {}
    for mode, fitting in estimates.items():
        rows = fitting.rows if fitting else config.rows or 1
        micro_batches = rows_per_rank // rows
        memory = train.planner.memory(shape, step_setup(config, mode), rows=rows, micro_batches=micro_batches)
        cells = {name: f"{size / 2**30:.2f}" for name, size in {**memory.parts, "total": memory.total}.items()}
        cells = {"rows x micro-batches": f"{rows} x {micro_batches}", **cells, "peak in": memory.phase}
        cells[f"fits in {gpu.memory_gib * (1 - train.planner.RESERVE):.1f}"] = "yes" if fitting else "no"
        columns.append([mode, *cells.values()])
    return table([*zip(["", *cells], *columns)])


def time_table(estimates: Mapping[str, train.Estimate | None]) -> str:
    """Return traffic, time and cost by mode, for the modes that fit."""
    columns, cells = [], {}
    for mode, fitting in estimates.items():
        if fitting:
            cells = {f"{kind} GB": f"{size / 1e9:.3f}" for kind, size in fitting.traffic.items()} | {
                "compute": format_duration(fitting.compute_seconds),
                "exposed communication": format_duration(fitting.exposed_seconds),
                "tokens/s": format_count(fitting.tokens_per_second),
                "whole run": format_duration(3600 * fitting.hours),
                "cost": f"${fitting.dollars:,.2f}",
            }
            columns.append([mode, *cells.values()])
    return table([*zip(["", *cells], *columns)])


def sweep(config: Config) -> str:
    """Return the table over depths and GPUs: batch, mode, time and cost of the first mode that fits."""
    config = dataclasses.replace(config, device_batch_size="auto", dollars_per_hour=None, shard_ranks=None)
    plans = {depth: resolve(config, depth) for depth in DEPTHS}
    rows = [["", *(f"depth {depth}" for depth in DEPTHS)]]
    for world_size, names in {1: SINGLE_GPUS, 8: EIGHT_GPUS}.items():
        config = dataclasses.replace(config, world_size=world_size, gpus_per_node=world_size)
        modes = {"replicate": ""} if world_size == 1 else {"zero2": "z", "fsdp": "f"}
        for name in names:
            gpu = distributed.GPU_SPECS[name]
            cells = [sweep_cell(config, modes, *plans[depth], gpu) for depth in DEPTHS]
            rows.append([f"{world_size} x {name} ({gpu.memory_gib:.0f} GiB)", *cells])
    return table(rows)


def sweep_cell(
    config: Config, modes: Mapping[str, str], shape: model.ModelConfig, plan: optim.Plan, gpu: distributed.GpuSpec
) -> str:
    if plan.total_batch_size % (shape.sequence_len * config.world_size):
        return "batch not divisible"
    for mode, letter in modes.items():
        if fitting := estimate(config, mode, shape, plan, gpu):
            return f"{fitting.rows}{letter} {format_duration(3600 * fitting.hours)} ${format_count(fitting.dollars)}"
    return "-"


def assumptions(config: Config, gpu: distributed.GpuSpec) -> str:
    planner = train.planner
    price = gpu.dollars_per_hour if config.dollars_per_hour is None else config.dollars_per_hour
    nccl = f" and {planner.NCCL_BYTES / 2**30:.2f} GiB NCCL's" if config.world_size > 1 else ""
    lines = [
        f"time: an MFU of {config.mfu:.0%} of {gpu.half_flops / 1e12:g} TFLOP/s (set mfu); evaluation and saving "
        "are extra",
        f"communication: {gpu.link_bytes_per_second / 1e9:g} GB/s to a GPU of the node, "
        f"{gpu.network_bytes_per_second / 1e9:g} GB/s a GPU between nodes; gathers and reductions of every "
        "micro-batch (fsdp, hsdp) overlap with computation, those once a step do not",
        f"cost: ${price:.2f} an hour and GPU (set dollars_per_hour); prices are guesses",
        f"memory: compiled step; {planner.RESERVE:.0%} stay free, {planner.CONTEXT_BYTES / 2**30:.2f} GiB are "
        f"CUDA's{nccl} (overhead); other programs on the GPU are extra",
    ]
    return "\n".join(f"  {line}" for line in lines)


def command(config: Config, estimates: Mapping[str, train.Estimate | None]) -> str:
    """Return the command that starts the planned run, or what to change if none fits."""
    mode = next((mode for mode in PREFERRED if estimates.get(mode)), "")
    fitting = estimates.get(mode)
    if not fitting:
        return "nothing fits: use more or larger GPUs, a smaller depth, or a shorter model.sequence_len"
    nodes = -(-config.world_size // config.gpus_per_node)
    several = f" --nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=<first node>:29500" if nodes > 1 else ""
    start = f"torchrun{several} --nproc_per_node={min(config.world_size, config.gpus_per_node)} launch.py"
    settings: dict[str, Any] = {"depth": config.depth, "device_batch_size": fitting.rows}
    if config.lora.rank:
        start += f" --experiment=sft --set run=<base run> --set lora.rank={config.lora.rank}"
        return f"{start} --set device_batch_size={fitting.rows} --set sharding.mode={mode}"
    if config.world_size > 1:
        settings["sharding.mode"] = mode
        if mode == "hsdp" and config.shard_ranks:
            settings["sharding.shard_ranks"] = config.shard_ranks
    if config.fp8:
        settings["train.linear"] = "fp8"
    if config.ema:
        settings["train.ema"] = 0.999
    for name in ("memory_budget", "embedding_moments"):
        if getattr(config, name) != getattr(Config, name):
            settings[f"train.{name}"] = getattr(config, name)
    defaults = set(flatten(Config()))
    settings |= {name: x for name, x in flatten(config) if (name, x) not in defaults and name.startswith(SHARED)}
    return " ".join([f"{start} --experiment=pretrain", *(f"--set {name}={value}" for name, value in settings.items())])
