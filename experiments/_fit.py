"""`fit=8gb`: the largest model, and the batch and the settings, that the planner fits into a GPU's memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from nanochat import distributed, model, optim, train
from nanochat.config import UserError
from nanochat.text import format_count, format_duration, table

if TYPE_CHECKING:
    from nanochat.train.planner import Choice, Setup

SIZE = re.compile(r"(\d{1,6}(?:\.\d+)?)(gi?b)", re.IGNORECASE)
Fit = Annotated[
    str, "auto, or a size above 0 such as 8gb or 7.5gib", lambda x: x.lower() == "auto" or size_bytes(x) > 0
]
LEAST_DEPTH, MOST_DEPTH = 4, 128
# What takes less memory, from the fastest and most exact: (train.memory_budget, train.embedding_moments).
FRUGAL = ((1.0, "float32"), (0.75, "float32"), (1.0, "bfloat16"), (0.75, "bfloat16"))
NO_BITS = "no estimate: the scaling rules give no loss; --experiment=scaling_laws measures it for your data"

Resolve = Callable[[int], tuple["model.ModelConfig", "optim.Plan"]]


class Fitted(NamedTuple):
    """A model, its run, and how a step of it is computed within `capacity` bytes."""

    shape: model.ModelConfig
    plan: optim.Plan
    choice: Choice
    capacity: int

    def settings(self) -> dict[str, Any]:
        """Return the settings of pretraining that were chosen, by dotted name."""
        setup = self.choice.setup
        return {
            "depth": self.shape.n_layer,
            "device_batch_size": self.choice.rows,
            "train.memory_budget": setup.memory_budget,
            "train.embedding_moments": str(setup.embedding_moments).removeprefix("torch."),
        }


def size_bytes(text: str) -> int:
    """Return the bytes of a size such as 8gb, 10^9 bytes each, or 8gib; 0 for any other text."""
    size = SIZE.fullmatch(text)
    return int(float(size[1]) * (2**30 if "i" in size[2].lower() else 10**9)) if size else 0


def largest(config: Any, setup: Setup, capacity: int, resolve: Resolve) -> Fitted:
    """Return the largest model that fits, or that of `config.depth`, as fast as it fits.

    Settings that are not at their defaults stay: depth, device_batch_size, and those of FRUGAL.

    Args:
        config: of pretraining. setup: of its steps. resolve: depth -> shape and plan.

    Raises:
        UserError: not even depth 4, or the given depth, fits.
    """
    default, fitted = train.StageConfig(), None
    rows = config.device_batch_size if config.device_batch_size not in (default.device_batch_size, "auto") else None
    for depth in [config.depth] if config.depth else range(LEAST_DEPTH, MOST_DEPTH + 1):
        shape, plan = resolve(depth)
        optim.scaling.accumulation_steps(plan.total_batch_size, rows or 1, shape.sequence_len, setup.world_size)
        rows_per_rank = plan.total_batch_size // (shape.sequence_len * setup.world_size)
        setups = frugal(config.train, setup)
        choice = train.planner.choose(shape, setups, rows_per_rank, capacity, rows)
        if not choice:
            if fitted:
                break
            needed = min(
                (
                    train.planner.memory(shape, x, rows=rows or 1, micro_batches=rows_per_rank // (rows or 1))
                    for x in setups
                ),
                key=lambda memory: memory.total,
            )
            raise UserError(
                f"fit={config.fit}: depth {depth} with a batch of {rows or 1} x {shape.sequence_len} tokens needs "
                f"{needed.total / 2**30:.2f} GiB ({parts(needed)}), and {usable(capacity):.2f} of "
                f"{capacity / 2**30:.2f} GiB may be used; set fit={required_gib(needed)}gib or more, "
                + ("a smaller depth, " if depth > LEAST_DEPTH else "")
                + "or a shorter model.sequence_len"
            )
        fitted = Fitted(shape, plan, choice, capacity)
    assert fitted
    return fitted


def frugal(config: train.TrainConfig, setup: Setup) -> list[Setup]:
    """Return the setups to try, those settings that are not at their defaults as they are."""
    import torch

    given = (config.memory_budget, config.embedding_moments)
    default = (train.TrainConfig.memory_budget, train.TrainConfig.embedding_moments)
    tried = {tuple(x if x != d else y for x, d, y in zip(given, default, option)): None for option in FRUGAL}
    return [
        dataclasses.replace(setup, memory_budget=budget, embedding_moments=getattr(torch, str(dtype)))
        for budget, dtype in tried
    ]


def usable(capacity: int) -> float:
    return capacity * (1 - train.planner.RESERVE) / 2**30


def required_gib(needed: train.planner.Memory) -> float:
    """Return the memory that leaves enough free, rounded up to a tenth of a GiB."""
    return -(-needed.total * 10 // (1 - train.planner.RESERVE) // 2**30) / 10


def parts(memory: train.planner.Memory) -> str:
    return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.parts.items() if size >= 2**30 / 200)


def describe(fitted: Fitted, fit: str, gpu: str, resolve: Resolve, mfu: float = 0.5) -> str:
    """Return what was chosen as text: model, step, memory by part, tokens, time, and smaller models.

    Args:
        gpu: its name in GPU_SPECS, or that CUDA reports; the time is only known for those in the table.
    """
    shape, plan, choice, capacity = fitted
    setup, memory = choice.setup, choice.memory
    micro_batches = plan.total_batch_size // (choice.rows * shape.sequence_len * setup.world_size)
    ranks = f" x {setup.world_size} ranks" if setup.world_size > 1 else ""
    facts = {
        "model": f"depth {shape.n_layer}, {model.count(shape)['total']:,} parameters",
        "step": f"{plan.total_batch_size:,} tokens = {micro_batches} x {choice.rows} rows x "
        f"{shape.sequence_len} tokens{ranks}",
        "settings": ", ".join(f"{name}={value}" for name, value in fitted.settings().items()),
        "memory": f"{memory.total / 2**30:.2f} GiB at the peak, in {memory.phase}: {parts(memory)}",
        "run": f"{plan.num_steps:,} steps, {plan.total_tokens:,} tokens, {plan.total_flops:.3g} FLOPs",
        "time": f"{duration(fitted, gpu, mfu)} on {setup.world_size} x {gpu}, at {mfu:.0%} MFU",
        "bits per byte": NO_BITS,
    }
    if choice.rows * shape.sequence_len < train.planner.ENOUGH_TOKENS and micro_batches > 1:
        facts["note"] = (
            f"a step is {micro_batches} micro-batches of {choice.rows * shape.sequence_len:,} tokens, which may not "
            "keep a GPU busy: it can take longer than this; a smaller depth has larger ones"
        )
    title = (
        f"fit={fit}: {usable(capacity):.2f} GiB of {capacity / 2**30:.2f} GiB ({train.planner.RESERVE:.0%} stay free)"
    )
    smaller = [depth for depth in (4, 8, 10, 12, 16, 20, 24, 30) if depth < shape.n_layer]
    rows = [["smaller models (depth)", "batch", "settings", "tokens", "time"]]
    for depth in smaller:
        rows.append(cells(fitted, depth, gpu, resolve, mfu))
    lines = [title, *(f"  {name:<15}{text}" for name, text in facts.items())]
    return "\n".join([*lines, *([table(rows)] if smaller else [])])


def cells(fitted: Fitted, depth: int, gpu: str, resolve: Resolve, mfu: float) -> list[str]:
    """Return a row of the table of smaller models in the same memory."""
    shape, plan = resolve(depth)
    rows_per_rank = plan.total_batch_size // (shape.sequence_len * fitted.choice.setup.world_size)
    setups = frugal(train.TrainConfig(), fitted.choice.setup)
    choice = train.planner.choose(shape, setups, rows_per_rank, fitted.capacity)
    if not choice:
        return [str(depth), "-", "", "", ""]
    smaller = Fitted(shape, plan, choice, fitted.capacity)
    changed = {k: v for k, v in smaller.settings().items() if k.startswith("train.") and v not in (1.0, "float32")}
    text = " ".join(f"{k}={v}" for k, v in changed.items()) or "defaults"
    return [str(depth), str(choice.rows), text, format_count(plan.total_tokens), duration(smaller, gpu, mfu)]


def duration(fitted: Fitted, gpu: str, mfu: float) -> str:
    """Return the time of the run as text; "unknown" for a device that is not in GPU_SPECS."""
    spec = distributed.GPU_SPECS.get(gpu) or distributed.hardware.gpu_spec(gpu)
    if spec is None:
        return "unknown"
    spec = spec._replace(memory_gib=fitted.capacity / distributed.GIB)
    cost = train.planner.estimate(
        fitted.shape, fitted.plan, spec, fitted.choice.setup, mfu=mfu, rows=fitted.choice.rows
    )
    return format_duration(3600 * cost.hours) if cost else "unknown"


def capacity_bytes(config: Any, runtime: distributed.Runtime) -> int:
    """Return the memory to fill on each device: that of `config.fit`, or for auto the free memory."""
    if size := size_bytes(config.fit):
        return size
    free = -distributed.all_reduce_max(-distributed.free_bytes(runtime.device, runtime.node_ranks))
    if runtime.device.type == "cpu" and not config.depth:
        raise UserError(
            f"fit=auto: on a CPU time is the limit, not the {free / 2**30:.1f} GiB that are free: set depth as "
            "well, such as depth=4, or plan for a GPU: --experiment=plan --set fit=8gb"
        )
    return free


def device_name(device: Any) -> str:
    """Return the name of a GPU as CUDA reports it, or the type of another device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
