"""Plan a pretraining run without a GPU: memory by part, largest batch, traffic, time and cost, by mode and machine.

    torchrun launch.py --experiment=plan --set depth=20 --set world_size=8 --set gpu=h100
    torchrun launch.py --experiment=plan --set depth=12 --set gpu=rtx3060
    torchrun launch.py --experiment=plan --set depth=32 --set world_size=32 --set gpu=h100 --set mode=hsdp

Takes half a minute on two CPU cores, most of it to trace the loss; nothing is allocated or downloaded. Prints
parameters, tokens and FLOPs (exact), memory of a GPU by part at the fullest moment of a step, the largest device batch
that fits, bytes on the wire, hours and cost, a table over depths and machines, and the command to run next. Settings
that it shares with --experiment=pretrain mean the same there.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from experiments import pretrain
from experiments.pretrain import ShapeConfig
from nanochat.config import UserError, nearest
from nanochat.distributed import GIB, GPU_SPECS, GpuSpec, Runtime
from nanochat.model import ModelConfig, gpt
from nanochat.optim import Plan, scaling
from nanochat.text import format_count, format_duration
from nanochat.train import Estimate, planner

DEPTHS = (12, 16, 20, 24, 26, 30, 34)
SINGLES = ("rtx3070", "rtx3060", "rtx4090", "rtx5090", "l40s", "a100-80gb", "h100", "h200", "b200")
EIGHTS = ("rtx3060", "rtx4090", "a100-80gb", "h100", "h200", "b200")
PREFERRED = ("zero2", "hsdp", "fsdp", "replicate")  # the first that fits is the one to run


@dataclasses.dataclass(frozen=True)
class Config:
    """What to plan for.

    Attributes:
        depth, model, total_batch_size, num_iterations, target_flops, target_param_data_ratio: as for pretrain.
        world_size: GPUs of the job. gpu: their type. gpus_per_node: how many share a fast link.
        mode: of sharding, or all. shard_ranks: of hsdp; none: those of a node.
        device_batch_size: rows of a micro-batch, or auto: the largest that fits.
        fp8: large products in float8, which saves no time in this estimate unless mfu says so.
        mfu: share of the GPU's 16-bit limit that a step reaches. dollars_per_hour: of one GPU; none: the table's.
        chunk_tokens: of the loss. table: whether to print all depths and machines too.
    """

    depth: int = 20
    world_size: int = 1
    gpu: str = "h100"
    gpus_per_node: int = 8
    mode: Literal["all", "replicate", "zero2", "fsdp", "hsdp"] = "all"
    shard_ranks: int | None = None
    device_batch_size: int | Literal["auto"] = "auto"
    fp8: bool = False
    mfu: float = planner.MFU
    dollars_per_hour: float | None = None
    chunk_tokens: int = 8192
    table: bool = True
    total_batch_size: int | None = None
    num_iterations: int | None = None
    target_flops: float | None = None
    target_param_data_ratio: float = 12.0
    model: ShapeConfig = ShapeConfig()

    def __post_init__(self) -> None:
        for name in ("world_size", "gpus_per_node", "mfu", "chunk_tokens", "shard_ranks", "device_batch_size"):
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"{name}={value}: must be more than 0")


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Print the plan, on the one rank that prints."""
    machine = find(config.gpu)
    modes = modes_of(config)
    shape, plan = resolve(config, config.depth)
    scaling.accumulation_steps(plan.total_batch_size, 1, shape.sequence_len, config.world_size)  # or says what divides
    if config.device_batch_size != "auto":
        scaling.accumulation_steps(
            plan.total_batch_size, config.device_batch_size, shape.sequence_len, config.world_size
        )
    if not runtime.is_main:
        return
    print(f"plan: depth {config.depth} on {config.world_size} x {config.gpu} ({machine.memory_gib:g} GiB each)\n")
    print(counts(shape, plan), flush=True)
    found = {mode: estimate(config, mode, shape, plan, machine) for mode in modes}
    print(memory_table(config, shape, plan, machine, found), flush=True)
    print(time_table(found))
    if config.table:
        print(sweep(config), flush=True)
    print(assumptions(config, machine))
    print(f"\nnext: {command(config, found)}")


def find(gpu: str) -> GpuSpec:
    """Return the machine of that name. Raises: UserError."""
    if gpu.lower() not in GPU_SPECS:
        raise UserError(f"gpu={gpu}: not in the table of nanochat/machines.py{nearest(gpu.lower(), GPU_SPECS)}")
    return GPU_SPECS[gpu.lower()]


def modes_of(config: Config) -> Sequence[str]:
    """Return the modes to compare; a single GPU has one, and hsdp is for several groups. Raises: UserError."""
    shards = config.shard_ranks or min(config.gpus_per_node, config.world_size)
    if config.mode in ("all", "hsdp") and config.world_size % shards:
        if config.mode == "hsdp" or config.shard_ranks:
            raise UserError(f"hsdp: groups of {shards} do not divide world_size={config.world_size}; set shard_ranks")
        return planner.MODES[:3]
    if config.mode != "all":
        return [config.mode]
    if config.world_size == 1:
        return ["replicate"]
    return planner.MODES if 1 < shards < config.world_size else planner.MODES[:3]


def resolve(config: Config, depth: int) -> tuple[ModelConfig, Plan]:
    """Return shape and plan at a depth, as pretrain does it for the same settings."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in SHARED}
    return pretrain.resolve(dataclasses.replace(pretrain.config(), **shared | {"depth": depth}), None)


SHARED = ("model", "total_batch_size", "num_iterations", "target_flops", "target_param_data_ratio")


def estimate(config: Config, mode: str, shape: ModelConfig, plan: Plan, machine: GpuSpec, **change: Any) -> Any:
    """Return the planner's estimate, or None where it does not fit."""
    world_size = change.get("world_size", config.world_size)
    how: dict[str, Any] = {
        "mode": mode,
        "world_size": world_size,
        "node_ranks": config.gpus_per_node,
        "shard_ranks": config.shard_ranks or min(config.gpus_per_node, world_size),
        "dtype": torch.bfloat16,
        "mfu": config.mfu,
        "rows": None if config.device_batch_size == "auto" else config.device_batch_size,
        "fp8": config.fp8,
        "chunk_tokens": config.chunk_tokens,
        "dollars_per_hour": config.dollars_per_hour,
    }
    return planner.estimate(shape, plan, machine, **how | change)


def counts(shape: ModelConfig, plan: Plan) -> str:
    """Return parameters by group, tokens, steps and FLOPs as text."""
    numbers = gpt.count(shape)
    groups = {name: n for name, n in numbers.items() if name not in ("total", "scaling")}
    lines = [f"  {name.replace('_', ' '):<18}{n:>16,}" for name, n in [*groups.items(), ("total", numbers["total"])]]
    facts = {
        "shape": f"{shape.n_layer} layers, width {shape.n_embd} = {shape.n_head} heads of {shape.head_dim}, "
        f"vocabulary {shape.vocab_size}, {shape.sequence_len} tokens of context",
        "step": f"{plan.total_batch_size:,} tokens",
        "run": f"{plan.num_steps:,} steps, {plan.total_tokens:,} tokens "
        f"({plan.total_tokens / numbers['scaling']:.2f} per scaling parameter)",
        "FLOPs": f"{plan.flops_per_token:,} a token, {plan.total_flops:.4g} in all",
    }
    return "\n".join(["parameters by group", *lines, *(f"  {k:<18}{v}" for k, v in facts.items())])


def columns(rows: Iterable[Sequence[str]], *, first: int = 22, width: int = 14) -> str:
    """Return rows of a table: names to the left, cells to the right."""
    return "\n".join(f"  {name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells) for name, *cells in rows)


def memory_table(
    config: Config, shape: ModelConfig, plan: Plan, machine: GpuSpec, found: dict[str, Estimate | None]
) -> str:
    """Return memory by part and mode; of a mode that does not fit, with the batch that was asked for or one row."""
    rows_per_rank = plan.total_batch_size // (shape.sequence_len * config.world_size)
    memories, batches = {}, {}
    for mode, one in found.items():
        rows = one.rows if one else 1 if config.device_batch_size == "auto" else config.device_batch_size
        batches[mode] = f"{rows} x {rows_per_rank // rows}"
        memories[mode] = planner.memory(
            shape,
            rows=rows,
            micro_batches=rows_per_rank // rows,
            mode=mode,
            world_size=config.world_size,
            shard_ranks=config.shard_ranks or min(config.gpus_per_node, config.world_size),
            dtype=torch.bfloat16,
            fp8=config.fp8,
            chunk_tokens=config.chunk_tokens,
        )
    names = list(next(iter(memories.values())).parts)
    room = machine.memory_gib * (1 - planner.RESERVE)
    lines = [["", *found], ["rows x micro-batches", *batches.values()]]
    lines += [[name, *(f"{m.parts[name] / GIB:.2f}" for m in memories.values())] for name in names]
    lines += [
        ["total", *(f"{m.total / GIB:.2f}" for m in memories.values())],
        ["fullest moment", *(m.moment for m in memories.values())],
        [f"fits in {room:.1f}", *("yes" if one else "no" for one in found.values())],
    ]
    return "\nmemory of one GPU in GiB, at the fullest moment of a step\n" + columns(lines)


def time_table(found: dict[str, Estimate | None]) -> str:
    """Return traffic, time and cost by mode, for the modes that fit."""
    fits = {mode: one for mode, one in found.items() if one}
    if not fits:
        return ""
    kinds = list(next(iter(fits.values())).traffic)
    lines = [["", *fits]]
    lines += [[f"{kind} GB", *(f"{one.traffic[kind] / 1e9:.3f}" for one in fits.values())] for kind in kinds]
    lines += [
        ["computing", *(format_duration(one.compute_seconds) for one in fits.values())],
        ["waiting for the wire", *(format_duration(one.exposed_seconds) for one in fits.values())],
        ["tokens/s", *(format_count(one.tokens_per_second) for one in fits.values())],
        ["whole run", *(format_duration(3600 * one.hours) for one in fits.values())],
        ["cost", *(f"${one.dollars:,.2f}" for one in fits.values())],
    ]
    return "\none step: bytes that a GPU sends, and time\n" + columns(lines)


def sweep(config: Config) -> str:
    """Return the table over depths and machines."""
    free = dataclasses.replace(config, device_batch_size="auto", dollars_per_hour=None, shard_ranks=None)
    plans = {depth: resolve(free, depth) for depth in DEPTHS}
    lines = [["", *(f"depth {depth}" for depth in DEPTHS)]]
    for count, names in {1: SINGLES, 8: EIGHTS}.items():
        for name in names:
            gib = GPU_SPECS[name].memory_gib
            cells = [cell(free, *plans[depth], GPU_SPECS[name], count) for depth in DEPTHS]
            lines.append([f"{count} x {name} ({gib:.0f} GiB)", *cells])
    legend = "device batch (z: zero2, f: fsdp), time and cost of the whole run; -: one row does not fit"
    return f"\nall depths on other machines: {legend}\n" + columns(lines, first=26, width=19)


def cell(config: Config, shape: ModelConfig, plan: Plan, machine: GpuSpec, world_size: int) -> str:
    """Return batch, mode, time and cost of the first mode that fits."""
    if plan.total_batch_size % (shape.sequence_len * world_size):
        return "batch not divisible"
    for mode in ("replicate",) if world_size == 1 else ("zero2", "fsdp"):
        one = estimate(
            config, mode, shape, plan, machine, world_size=world_size, node_ranks=world_size, shard_ranks=world_size
        )
        if one:
            letter = "" if world_size == 1 else mode[0]
            return f"{one.rows}{letter} {format_duration(3600 * one.hours)} ${format_count(one.dollars)}"
    return "-"


def assumptions(config: Config, machine: GpuSpec) -> str:
    """Return what is not known but assumed."""
    price = machine.dollars_per_hour if config.dollars_per_hour is None else config.dollars_per_hour
    nccl = f" and {planner.NCCL_BYTES / GIB:.2f} GiB of NCCL's" if config.world_size > 1 else ""
    lines = [
        f"time: an MFU of {config.mfu:.0%} of {machine.half_flops / 1e12:g} TFLOP/s (set mfu); evaluation and saving "
        "come on top",
        f"wire: {machine.link_bytes_per_second / 1e9:g} GB/s to a GPU of the node, "
        f"{machine.network_bytes_per_second / 1e9:g} GB/s a GPU between nodes; gathers and reductions of every "
        "micro-batch (fsdp, hsdp) hide behind the computation as long as it lasts, those of once a step do not",
        f"cost: ${price:.2f} an hour and GPU (set dollars_per_hour); prices are guesses",
        f"memory: compiled step; {planner.RESERVE:.0%} stay free, {planner.CONTEXT_BYTES / GIB:.2f} GiB are "
        f"CUDA's{nccl} (overhead); other programs on the GPU come on top",
    ]
    return "\nassumed\n" + "\n".join(f"  {line}" for line in lines)


def command(config: Config, found: dict[str, Estimate | None]) -> str:
    """Return the command that starts the planned run, or what to change where none fits."""
    mode = next((m for m in PREFERRED if found.get(m)), None)
    if mode is None:
        return "nothing fits: take more or larger GPUs, a smaller depth, or a shorter model.sequence_len"
    one = found[mode]
    assert one is not None
    here = min(config.world_size, config.gpus_per_node)
    nodes = -(-config.world_size // config.gpus_per_node)
    words = ["torchrun"] + (
        [f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=<first node>:29500"] if nodes > 1 else []
    )
    words += [f"--nproc_per_node={here} launch.py --experiment=pretrain --set depth={config.depth}"]
    words += [f"--set device_batch_size={one.rows}"]
    if config.world_size > 1:
        words += [f"--set sharding.mode={mode}"]
        if mode == "hsdp" and config.shard_ranks:
            words += [f"--set sharding.shard_ranks={config.shard_ranks}"]
    if config.fp8:
        words += ["--set train.linear=fp8"]
    plain = Config()
    for name in SHARED:
        value, usual = getattr(config, name), getattr(plain, name)
        if name == "model":
            words += [
                f"--set model.{f.name}={getattr(value, f.name)}"
                for f in dataclasses.fields(value)
                if getattr(value, f.name) != getattr(usual, f.name)
            ]
        elif value != usual:
            words += [f"--set {name}={value}"]
    return " ".join(words)
