"""What a training run needs before it is started: memory of a GPU by part, bytes on the wire, time and cost.

Counts and FLOPs are those of `model`, memory in a step that of traces (`footprint`), placements those of `sharding`.
What is assumed beside that is named in the constants below and in `machines`.
"""

import collections
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat import model
from nanochat.distributed import GIB, GpuSpec, shard_dim
from nanochat.model import ModelConfig
from nanochat.optim import MATRIX, Plan
from nanochat.train import activation_memory

MODES = ("replicate", "zero2", "fsdp", "hsdp")
CONTEXT_BYTES = 700 * 2**20  # CUDA's context, loaded kernels, cuBLAS workspaces
NCCL_BYTES = 900 * 2**20  # its channels' buffers, where there are several ranks
RESERVE = 0.05  # share of a GPU's memory that a plan leaves free, for what fragmentation costs
MFU = 0.5  # share of the 16-bit limit that a step reaches, where nobody says better


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the moment of a step that needs most.

    Attributes:
        parameters, optimizer: the state at rest.
        gradients: sums over micro-batches, and those made so far. activations: kept for the backward pass, and what
            a layer has under way. logits: of one chunk, with their gradient.
        weights: copies in the compute dtype, gathered layers, gradients under way. update: Muon's stacks.
        overhead: `CONTEXT_BYTES` and `NCCL_BYTES`; the only part that torch's allocator does not count.
        moment: forward, backward, reduce or update.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    weights: int
    update: int
    overhead: int
    moment: str

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated reports: all parts but the overhead."""
        return self.total - self.overhead

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "moment"}


def ranks_per_copy(mode: str, world_size: int, shard_ranks: int) -> int:
    """Return how many ranks share one copy of the state: the size of the mesh's shard axis.

    Raises:
        ValueError: unknown mode, or hsdp's groups do not divide the job.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode}: expected {', '.join(MODES)}")
    if mode == "hsdp" and (shard_ranks < 1 or world_size % shard_ranks):
        raise ValueError(f"shard_ranks={shard_ranks}: must divide the {world_size} ranks")
    return {"replicate": 1, "hsdp": shard_ranks}.get(mode, world_size)


def memory(
    shape: ModelConfig,
    *,
    rows: int,
    micro_batches: int,
    mode: str,
    world_size: int,
    shard_ranks: int,
    dtype: torch.dtype,
    fp8: bool = False,
    chunk_tokens: int = 8192,
) -> Memory:
    """Return the memory of one rank at the fullest moment of a step.

    Args:
        shape: the model. rows: of a micro-batch, on one rank. micro_batches: of a step.
        mode: one of MODES. world_size: ranks of the job. shard_ranks: of hsdp, ranks that share one copy.
        dtype: of the computation. fp8: whether large products are float8. chunk_tokens: of the loss.
    """
    found = moments(
        shape, rows=rows, micro_batches=micro_batches, mode=mode, world_size=world_size, shard_ranks=shard_ranks,
        dtype=dtype, fp8=fp8, chunk_tokens=chunk_tokens,
    )  # fmt: skip
    return max(found, key=lambda m: m.total)


@functools.lru_cache(maxsize=4096)
def moments(
    shape: ModelConfig,
    *,
    rows: int,
    micro_batches: int,
    mode: str,
    world_size: int,
    shard_ranks: int,
    dtype: torch.dtype,
    fp8: bool = False,
    chunk_tokens: int = 8192,
) -> tuple[Memory, ...]:
    """Return the memory at the fullest point of each part of a step: forward, backward, reduce and update."""
    shards = ranks_per_copy(mode, world_size, shard_ranks)
    cut = mode in ("fsdp", "hsdp") and shards > 1  # parameters lie in parts, and are gathered layer by layer
    sizes = state(shape, mode=mode, shards=shards, dtype=dtype)
    overhead = CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)
    base = functools.partial(Memory, sizes.parameters, sizes.optimizer, overhead=overhead)
    # The sum over micro-batches is there beside what each of them makes; fsdp sums parts.
    totals = (sizes.parts_f32 if cut else sizes.whole_f32) if micro_batches > 1 else 0
    flight = _layer_params(shape) * (dtype.itemsize + 4) if cut else 0  # the next layer's weights, the last gradients
    curves, middle = activation_memory.curves(shape, rows, dtype, fp8, chunk_tokens, shards if cut else 1, cut)
    found = []
    for name, span in {"forward": slice(0, middle), "backward": slice(middle, None)}.items():
        part = {key: curve[span] for key, curve in curves.items()}
        at = int(np.argmax(sum(part.values())))
        activations, logits, gradients, weights = (round(float(part[key][at])) for key in activation_memory.PARTS)
        found.append(base(gradients + totals, activations, logits, weights + flight, 0, moment=name))
    made = totals or (sizes.parts_f32 if cut else sizes.whole_made)
    # Reduced gradients are new tensors; what they were made of is held by the step until the update is done.
    reduced = sizes.parts_f32 if world_size > 1 and not (mode == "fsdp" and cut) else 0
    casts = sizes.tables_f32 if world_size > 1 and not cut and not totals else 0
    found.append(base(made + reduced, 0, 0, casts, 0, moment="reduce"))
    found.append(base(made + reduced, 0, 0, 0, _muon_bytes(shape, shards, dtype), moment="update"))
    return tuple(found)


class State(NamedTuple):
    """Bytes of one rank between steps, and of gradients: whole and this rank's parts in float32, whole as made."""

    parameters: int
    optimizer: int
    whole_f32: int
    parts_f32: int
    whole_made: int
    tables_f32: int


def state(shape: ModelConfig, *, mode: str, shards: int, dtype: torch.dtype) -> State:
    """Return the bytes of parameters, optimizer state and gradients of one rank; see `memory` and `ranks_per_copy`."""
    parameters, moments, whole, parts, made, tables = 0, 0, 0, 0, 0, 0
    for row in model.spec(shape).values():
        numel = math.prod(row.shape)
        dim = shard_dim(row.shape, row.axes, shards)
        part = numel if dim is None else numel // shards
        stored = model.storage_dtype(row, dtype).itemsize
        parameters += stored * (part if mode in ("fsdp", "hsdp") else numel)
        if row.group == MATRIX:
            second = activation_memory.second_shape(row.shape)
            even = dim is not None and any(n % shards == 0 for n in second)
            moments += 4 * (part + math.prod(second) // (shards if even else 1))
        else:
            moments += 2 * 4 * part
        whole, parts, made = whole + 4 * numel, parts + 4 * part, made + stored * numel
        tables += 4 * numel if stored != 4 else 0
    step_and_scaler = 8 + 8 + 4 + 8
    return State(parameters, moments + step_and_scaler, whole, parts, made, tables)


def _layer_params(shape: ModelConfig) -> int:
    layers: dict[str, int] = {}
    for name, row in model.spec(shape).items():
        if name.startswith("layers."):
            layer = name.split(".")[1]
            layers[layer] = layers.get(layer, 0) + math.prod(row.shape)
    return max(layers.values())


def _muon_bytes(shape: ModelConfig, shards: int, dtype: torch.dtype) -> int:
    """Return what the update holds beside state and gradients: a stack, its results, and those of the one before."""
    stacks = collections.Counter(row.shape for row in model.spec(shape).values() if row.group == MATRIX)
    most, before = 0.0, 0.0
    for (rows, columns), n in stacks.items():
        elements = -(-n // shards) * rows * columns
        unit = 512 / min(rows, columns)  # the bytes are in proportion to the elements
        each = activation_memory.muon_bytes_per_element(round(rows * unit), round(columns * unit), dtype)
        most = max(most, each * elements + before)
        before = 2 * 4 * elements  # new parameters and momenta, until the next stack's take their place
    return round(most)


def largest_batch(
    shape: ModelConfig,
    rows_per_rank: int,
    capacity_bytes: int,
    *,
    mode: str,
    world_size: int,
    shard_ranks: int,
    dtype: torch.dtype,
    fp8: bool = False,
    chunk_tokens: int = 8192,
) -> int | None:
    """Return the largest device batch that divides `rows_per_rank` and fits, with `RESERVE` left; None: none fits.

    Args:
        rows_per_rank: rows of a step on one rank. capacity_bytes: memory of a GPU. The rest is as for `memory`.
    """
    room = capacity_bytes * (1 - RESERVE)
    for rows in sorted((n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0), reverse=True):
        needed = memory(
            shape, rows=rows, micro_batches=rows_per_rank // rows, mode=mode, world_size=world_size,
            shard_ranks=shard_ranks, dtype=dtype, fp8=fp8, chunk_tokens=chunk_tokens,
        )  # fmt: skip
        if needed.total <= room:
            return rows
    return None


# The wire


def traffic(
    shape: ModelConfig,
    *,
    micro_batches: int,
    mode: str,
    world_size: int,
    shard_ranks: int,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Return the bytes that one rank sends in a step, by kind of collective.

    Of n bytes, an all-gather or a reduce-scatter over W ranks sends n·(W-1)/W from each, an all-reduce twice that. The
    keys are all_gather, reduce_scatter (of fsdp and hsdp once or twice a micro-batch, else once a step), all_reduce
    (over the replicas, and of the small parameters over all ranks) and all_to_all (of Muon: momenta out in the
    compute dtype, updates back in float32).
    """
    shards = ranks_per_copy(mode, world_size, shard_ranks)
    replicas = world_size // shards
    inside, across, everywhere = ((n - 1) / n for n in (shards, replicas, world_size))
    sent: dict[str, float] = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce", "all_to_all"), 0.0)
    stacks: collections.Counter[tuple[int, ...]] = collections.Counter()
    for row in model.spec(shape).values():
        numel = math.prod(row.shape)
        if shard_dim(row.shape, row.axes, shards) is None:
            # Over a mesh without a shard axis all parameters are whole, and all are reduced over all ranks.
            sent["all_reduce"] += 2 * everywhere * 4 * numel
            continue
        if mode == "zero2":
            sent["all_gather"] += inside * model.storage_dtype(row, dtype).itemsize * numel
            sent["reduce_scatter"] += inside * 4 * numel
        else:
            # The backward needs the weight of a product once more; lm_head's gradient is made in the forward.
            gathers = 2 if row.group == MATRIX else 1
            sent["all_gather"] += micro_batches * gathers * inside * dtype.itemsize * numel
            sent["reduce_scatter"] += micro_batches * inside * 4 * numel
            sent["all_reduce"] += 2 * across * 4 * numel / shards
        if row.group == MATRIX:
            stacks[row.shape] += 1
    half = dtype.itemsize if dtype == torch.bfloat16 else 4
    for size, n in stacks.items():
        padded = -(-n // shards) * shards
        second = activation_memory.second_shape(size)
        sent["all_to_all"] += inside * padded * math.prod(size) / shards * (half + 4)
        if any(m % shards == 0 for m in second):
            sent["all_to_all"] += inside * padded * math.prod(second) / shards * (4 + 4)
        else:  # every rank has it whole, and gets the others' back
            sent["all_gather"] += inside * padded * math.prod(second) * 4
    return sent


def wire_seconds(
    sent: dict[str, float], machine: GpuSpec, *, mode: str, world_size: int, node_ranks: int, shards: int
) -> tuple[float, float]:
    """Return the seconds of a step's collectives: those of every micro-batch, and those of once a step.

    A ring over several nodes enters each of them once, over the network of all its GPUs together; reductions between
    hsdp's groups, and all_to_all beyond a node, have the network of each GPU for themselves.
    """
    link, network = machine.link_bytes_per_second, machine.network_bytes_per_second

    def ring(ranks: int) -> float:
        return link if ranks <= node_ranks else min(link, network * node_ranks)

    alone = link if world_size <= node_ranks else network
    layers = (sent["all_gather"] + sent["reduce_scatter"]) / ring(shards)
    swaps = sent["all_to_all"] / (link if shards <= node_ranks else network)
    reductions = sent["all_reduce"] / (alone if mode == "hsdp" else ring(world_size))
    every = mode in ("fsdp", "hsdp")
    return (layers if every else 0.0), swaps + reductions + (0.0 if every else layers)


class Estimate(NamedTuple):
    """What a run on some machines comes to.

    Attributes:
        memory: of one rank. rows, micro_batches: of a step on one rank. traffic: see `traffic`.
        compute_seconds, exposed_seconds: of a step: products at the stated MFU, and communication not hidden.
        tokens_per_second, hours, dollars: of the job.
    """

    memory: Memory
    rows: int
    micro_batches: int
    traffic: dict[str, float]
    compute_seconds: float
    exposed_seconds: float
    tokens_per_second: float
    hours: float
    dollars: float


def estimate(
    shape: ModelConfig,
    plan: Plan,
    machine: GpuSpec,
    *,
    mode: str,
    world_size: int,
    node_ranks: int,
    shard_ranks: int,
    dtype: torch.dtype,
    mfu: float = MFU,
    rows: int | None = None,
    fp8: bool = False,
    chunk_tokens: int = 8192,
    dollars_per_hour: float | None = None,
) -> Estimate | None:
    """Return memory, time and cost of a run, or None where not even one row fits (or where `rows` do not).

    Collectives of every micro-batch (fsdp, hsdp) hide behind the computation as far as that lasts; those of once a
    step do not hide at all.

    Args:
        plan: from `scaling.plan`. node_ranks: GPUs in a node; groups of more ranks are as fast as the network.
        mfu: share of the machine's 16-bit limit that the products reach. rows: None takes the largest that fit.
    """
    rows_per_rank = plan.total_batch_size // (shape.sequence_len * world_size)
    how: dict[str, Any] = {"mode": mode, "world_size": world_size, "shard_ranks": shard_ranks, "dtype": dtype}
    traced: dict[str, Any] = how | {"fp8": fp8, "chunk_tokens": chunk_tokens}
    capacity = int(machine.memory_gib * GIB)
    rows = rows or largest_batch(shape, rows_per_rank, capacity, **traced)
    if rows is None:
        return None
    micro_batches = rows_per_rank // rows
    needed = memory(shape, rows=rows, micro_batches=micro_batches, **traced)
    if needed.total > capacity * (1 - RESERVE):
        return None
    sent = traffic(shape, micro_batches=micro_batches, **how)
    shards = ranks_per_copy(mode, world_size, shard_ranks)
    peak = machine.half_flops if dtype.itemsize == 2 else machine.single_flops
    compute = plan.flops_per_token * plan.total_batch_size / world_size / (mfu * peak)

    layers, once = wire_seconds(sent, machine, mode=mode, world_size=world_size, node_ranks=node_ranks, shards=shards)
    exposed = once + max(layers - compute, 0.0)
    step = compute + exposed
    hours = plan.num_steps * step / 3600
    price = machine.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    tokens_per_second = plan.total_batch_size / step
    return Estimate(
        needed, rows, micro_batches, sent, compute, exposed, tokens_per_second, hours, hours * world_size * price
    )
