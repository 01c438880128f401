"""Estimate a training run before it starts: memory of a GPU by part, bytes sent, time, and cost.

Counts and FLOPs are those of `model`, placements those of `sharding`. Memory within a step follows from the table
STEP_BYTES; everything else that is assumed is in the constants below and in `distributed.GPU_SPECS`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from nanochat import model
from nanochat.distributed import GIB, GpuSpec, shard_dim
from nanochat.model import ModelConfig
from nanochat.optim import MATRIX, Plan, second_shape

MODES = ("replicate", "zero2", "fsdp", "hsdp")
EMBEDDINGS = ("embedding", "value_embedding")  # groups of the optimizer whose moments may have two bytes
CONTEXT_BYTES = 700 * 2**20  # CUDA context, loaded kernels, cuBLAS workspaces
NCCL_BYTES = 900 * 2**20  # channel buffers, with several ranks
RESERVE = 0.05  # share of a GPU's memory left free for fragmentation
ENOUGH_TOKENS = 8192  # of a micro-batch: fewer may not keep a GPU busy
MFU = 0.5  # default share of the 16-bit peak that a step reaches


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a step is computed."""

    mode: str = "replicate"
    world_size: int = 1
    shard_ranks: int = 1  # ranks that share one copy of the state in hsdp
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False  # whether large matrix products use float8
    chunk_tokens: int = 8192  # of the loss
    node_ranks: int = 8  # groups of more ranks communicate over the network
    lora_rank: int = 0  # of adapters on a base that is full on every rank, in `dtype`; 0: all parameters are trained
    lora_targets: tuple[str, ...] = ()
    ema: bool = False  # whether there is an average of the weights
    memory_budget: float = 1.0  # fraction of the activations kept for the backward pass
    embedding_moments: torch.dtype = torch.float32  # dtype of the moments of token and value embeddings

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the state: the size of the mesh's shard axis."""
        return {"replicate": 1, "hsdp": self.shard_ranks}.get(self.mode, self.world_size)

    @property
    def sharded_params(self) -> bool:
        """Whether parameters are sharded and all-gathered layer by layer."""
        return self.mode in ("fsdp", "hsdp") and self.shards > 1 and not self.lora_rank

    def trained(self, shape: ModelConfig) -> Mapping[str, model.ParamSpec]:
        """Return the table of what is trained."""
        return model.lora.spec(shape, self.lora_rank, self.lora_targets) if self.lora_rank else model.spec(shape)


# Memory


class Memory(NamedTuple):
    """Bytes on one GPU at the peak of a phase of a step (forward, backward, reduce or update), by part.

    The parts are parameters and optimizer (and the average of the weights), held between steps; gradients: sums over
    micro-batches, and those computed so far; activations: kept for the backward pass, and temporaries of one layer;
    logits: of one chunk; weights: copies in the compute dtype, gathered layers, gradients before reduction; update:
    Muon's stacks; and overhead: CONTEXT_BYTES and NCCL_BYTES, the only part outside of torch's allocator.
    """

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Estimate of torch.cuda.max_memory_allocated."""
        return self.total - self.parts["overhead"]


class StepBytes(NamedTuple):
    """Bytes that a compiled forward and backward pass holds, for C channels, N heads and L layers."""

    layer: float  # kept for the backward pass per layer, token and channel
    head: float  # the same per layer, token and head
    last_layer: float  # temporaries per token and channel while the backward pass is in the last layer
    first_layer: float  # held per token and channel while the backward pass is in the first layer
    first_layer_depth: float  # the same, besides, per layer of the model


# By (bytes of the compute dtype, fp8). Fitted to traces of the loss (AOTAutograd with Inductor's decompositions,
# partitioner and fusion rules; flash attention) at depths 4-32, batches 1-64 and contexts 512-4096; compiled steps were
# within 10% of the traces. The tracing code is nanochat/footprint.py and liveness.py of commit 0798da5. To refit after
# a change to the model, run it on the new loss; or measure peak_memory_bytes with bench_train at two depths and two
# batch sizes: the differences give `layer`.
STEP_BYTES = {
    (4, False): StepBytes(74.0, 14, 12, 100, 4),
    (4, True): StepBytes(53.5, 14, 29, 82, 4),
    (2, False): StepBytes(37.0, 13, 6, 102, 6),
    (2, True): StepBytes(27.5, 13, 17, 70, 6),
}
# The same at a memory budget from RECOMPUTE_BUDGET to below 1: torch recomputes elementwise operations, if what is kept
# takes more than the parameters, against which it measures a budget. Fitted to traces at depths 4 and 8, batches 4 and
# 8. At 0.4 and less it recomputes products too, those of many layers at once: a step of depth 4 took more memory at its
# peak than without a budget. Nothing is saved in the plan for budgets below RECOMPUTE_BUDGET.
RECOMPUTE_BUDGET = 0.75
RECOMPUTED = {
    (4, False): StepBytes(42.0, 14, 36, 100, 4),
    (4, True): StepBytes(37.5, 14, 48, 82, 4),
    (2, False): StepBytes(21.0, 13, 12, 102, 6),
    (2, True): StepBytes(18.75, 13, 24, 70, 6),
}
ROUND_UP = 1.01  # the fit is off by up to 0.7% in either direction
LOSS_CHUNKS = 8  # a chunked loss keeps lm_head's gradient and its input for each of so many chunks


def memory(shape: ModelConfig, setup: Setup, *, rows: int, micro_batches: int) -> Memory:
    """Return the memory of one rank at the peak of a step of `micro_batches` of `rows` sequences each."""
    return max(phases(shape, setup, rows=rows, micro_batches=micro_batches), key=lambda m: m.total)


@functools.lru_cache(maxsize=4096)
def phases(shape: ModelConfig, setup: Setup, *, rows: int, micro_batches: int) -> tuple[Memory, ...]:
    """Return the memory at the peak of each phase of a step: forward, backward, reduce and update."""
    sizes = state_bytes(shape, setup)
    several, gathered = setup.world_size > 1, setup.sharded_params

    parts = ("parameters", "optimizer", "gradients", "activations", "logits", "weights", "update", "overhead")
    held = dict.fromkeys(parts, 0) | {name: sizes[name] for name in ("parameters", "optimizer")}
    held["overhead"] = CONTEXT_BYTES + (NCCL_BYTES if several else 0)
    # The sum over micro-batches is held besides the gradients of one micro-batch; fsdp sums shards.
    sums = (sizes["shards_f32"] if gathered else sizes["full_f32"]) if micro_batches > 1 else 0
    prefetch = _layer_params(shape) * (setup.dtype.itemsize + 4) if gathered else 0  # next weights, last gradients
    memories = []
    for phase, points in _micro_batch_bytes(shape, setup, rows).items():
        peak = max(points, key=lambda parts: sum(parts.values()))
        memory = Memory(phase, held | {name: round(ROUND_UP * size) for name, size in peak.items()})
        memory.parts["gradients"] += sums
        memory.parts["weights"] += prefetch
        memories.append(memory)
    made = sums or (sizes["shards_f32"] if gathered else sizes["full_made"])
    # Reduced gradients are new tensors, and what they were made from is freed only after the update.
    reduced = sizes["shards_f32"] if several and not (setup.mode == "fsdp" and gathered) else 0
    casts = sizes["embeddings_f32"] if several and not gathered and not sums else 0
    reduce = {"gradients": made + reduced, "weights": casts}
    update = {"gradients": made + reduced, "update": _muon_bytes(shape, setup)}
    return (*memories, Memory("reduce", held | reduce), Memory("update", held | update))


def _micro_batch_bytes(shape: ModelConfig, setup: Setup, rows: int) -> dict[str, list[dict[str, float]]]:
    """Return, for the forward and the backward pass, the bytes by part at each point that can be the peak."""
    spec = model.spec(shape).values()
    width, embedding = shape.n_embd, shape.padded_vocab * shape.n_embd
    itemsize, gathered = setup.dtype.itemsize, setup.sharded_params
    c, recomputed = (costs[itemsize, setup.fp8] for costs in (STEP_BYTES, RECOMPUTED))
    tokens = rows * shape.sequence_len
    chunk, chunks = (tokens, 1) if tokens <= setup.chunk_tokens else (setup.chunk_tokens, LOSS_CHUNKS)
    saved, less = (
        tokens * (shape.n_layer * (x.layer * width + x.head * shape.n_head + 8) + 20) for x in (c, recomputed)
    )
    cast_size = 1 if setup.fp8 else 2 if itemsize == 2 and not gathered else 0  # of float32 matrices, kept for backward
    if setup.lora_rank:  # merged matrices are new in every dtype
        cast_size = itemsize + setup.fp8
    casts = cast_size * sum(math.prod(row.shape) for row in spec if row.group == MATRIX)
    stored = sum(math.prod(row.shape) * model.storage_dtype(row, setup.dtype).itemsize for row in spec)
    if RECOMPUTE_BUDGET <= setup.memory_budget < 1 and saved + casts > stored:
        c, saved = recomputed, less
    # Gradients become float32 shards when they are reduced; without sharding they keep their dtype until the end.
    shards = setup.shards if gathered else 1
    grads = (
        sum(
            math.prod(row.shape) * (4 if gathered else model.storage_dtype(row, setup.dtype).itemsize)
            for row in setup.trained(shape).values()
        )
        / shards
    )
    layer_grads = 4 * 12 * width**2 / shards
    embedding_grad = (4 * (itemsize == 2) + itemsize * gathered) * embedding  # before its cast or reduction
    embedding_grad *= not setup.lora_rank
    forward = [
        {  # the logits of the last chunk
            "activations": saved + itemsize * width * (3 * tokens + chunks * chunk),
            "logits": (itemsize + setup.fp8) * chunk * shape.padded_vocab,
            "weights": casts + chunks * (4 if setup.fp8 else itemsize) * embedding,
        }
    ]
    if gathered:  # the forward pass may gather all weights before it uses the first
        weights = itemsize * sum(math.prod(row.shape) for row in spec)
        forward.append({"activations": itemsize * tokens * width, "weights": weights})
    backward = [
        {  # in the last layer
            "activations": saved + c.last_layer * tokens * width,
            "gradients": 6 * embedding / shards + layer_grads,
            "weights": casts + embedding_grad + 16 * width**2 * setup.fp8,
        },
        {  # in the first layer
            "activations": tokens * ((c.first_layer_depth * shape.n_layer + c.first_layer) * width + 38 * shape.n_head),
            "gradients": grads + (layer_grads if setup.lora_rank else -layer_grads),
        },
        {"activations": 4 * tokens * width, "gradients": grads, "weights": embedding_grad},  # at the end
    ]
    return {"forward": forward, "backward": backward}


def state_bytes(shape: ModelConfig, setup: Setup) -> Mapping[str, int]:
    """Return bytes of one rank: parameters and optimizer, held between steps, and gradients of all parameters.

    Gradients: "full_f32" and this rank's "shards_f32", "full_made": as they are computed, "embeddings_f32".
    """
    shards = setup.shards
    sizes = collections.Counter({"optimizer": 8 + 8 + 4 + 8})  # counts of steps, and the loss scale
    if setup.lora_rank:
        base = model.spec(shape).values()
        sizes["parameters"] += sum(row.numel * (setup.dtype.itemsize if len(row.shape) > 1 else 4) for row in base)
    for row in setup.trained(shape).values():
        numel = math.prod(row.shape)
        dim = shard_dim(row.shape, row.axes, shards)
        shard = numel if dim is None else numel // shards
        stored = model.storage_dtype(row, setup.dtype).itemsize
        sizes["parameters"] += stored * (shard if setup.mode in ("fsdp", "hsdp") else numel)
        if row.group == MATRIX:
            second = second_shape(row.shape)
            even = dim is not None and any(n % shards == 0 for n in second)
            sizes["optimizer"] += 4 * (shard + math.prod(second) // (shards if even else 1))
        else:
            sizes["optimizer"] += 2 * shard * (setup.embedding_moments.itemsize if row.group in EMBEDDINGS else 4)
        sizes["optimizer"] += 4 * shard if setup.ema else 0
        sizes["full_f32"] += 4 * numel
        sizes["shards_f32"] += 4 * shard
        sizes["full_made"] += stored * numel
        sizes["embeddings_f32"] += 4 * numel if stored != 4 else 0
    return sizes


def _layer_params(shape: ModelConfig) -> int:
    layers: collections.Counter[str] = collections.Counter()
    for name, row in model.spec(shape).items():
        if name.startswith("layers."):
            layers[name.split(".")[1]] += math.prod(row.shape)
    return max(layers.values())


def _muon_bytes(shape: ModelConfig, setup: Setup) -> int:
    """Return what the update holds besides state and gradients: a stack, its results, and those of the one before."""
    stacks = collections.Counter(row.shape for row in setup.trained(shape).values() if row.group == MATRIX)
    most, before = 0.0, 0.0
    for size, n in stacks.items():
        elements = -(-n // setup.shards) * math.prod(size)
        # Parameter, gradient, momentum and two temporaries in float32, and the product X·Xᵀ of the smaller side.
        per_element = 20.05 if setup.dtype == torch.bfloat16 else 20 + 4 * min(size) / max(size)
        most = max(most, per_element * elements + before)
        before = 2 * 4 * elements  # new parameters and momenta, until those of the next stack replace them
    return round(most)


def largest_batch(shape: ModelConfig, setup: Setup, rows_per_rank: int, capacity_bytes: int) -> int | None:
    """Return the largest device batch size that divides `rows_per_rank` and fits, or None.

    Args:
        rows_per_rank: sequences of a step on one rank. capacity_bytes: memory of a GPU, of which RESERVE stays free.
    """
    for rows in sorted((n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0), reverse=True):
        if fits(memory(shape, setup, rows=rows, micro_batches=rows_per_rank // rows), capacity_bytes):
            return rows
    return None


class Choice(NamedTuple):
    """How to compute a step, with how many sequences in a micro-batch, and its memory."""

    setup: Setup
    rows: int
    memory: Memory


def choose(
    shape: ModelConfig, setups: Sequence[Setup], rows_per_rank: int, capacity_bytes: int, rows: int | None = None
) -> Choice | None:
    """Return the first of `setups` that fits with ENOUGH_TOKENS, else that with the largest batch; None: none fits.

    Args:
        rows_per_rank: sequences of a step on one rank. rows: of a micro-batch; default: the most that fit.
    """
    best: Choice | None = None
    for setup in setups:
        most = rows or largest_batch(shape, setup, rows_per_rank, capacity_bytes) or 0
        if most <= (best.rows if best else 0):
            continue
        needed = memory(shape, setup, rows=most, micro_batches=rows_per_rank // most)
        if fits(needed, capacity_bytes):
            best = Choice(setup, most, needed)
        if best and most * shape.sequence_len >= ENOUGH_TOKENS:
            break
    return best


def fits(needed: Memory, capacity_bytes: float) -> bool:
    """Return whether a step fits and leaves RESERVE free."""
    return needed.total <= capacity_bytes * (1 - RESERVE)


# Communication


def traffic(shape: ModelConfig, setup: Setup, *, micro_batches: int) -> dict[str, float]:
    """Return the bytes that one rank sends in a step, by kind of collective.

    Of n bytes, an all-gather or a reduce-scatter over W ranks sends n·(W-1)/W from each, an all-reduce twice that. The
    keys are all_gather, reduce_scatter (in fsdp and hsdp once or twice a micro-batch, else once a step), all_reduce
    (over the replicas, and of small parameters over all ranks) and all_to_all (of Muon: momenta sent, and updates
    returned, in bfloat16 if that is the compute dtype).
    """
    shards = setup.shards
    within, across, overall = ((n - 1) / n for n in (shards, setup.world_size // shards, setup.world_size))
    sent: dict[str, float] = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce", "all_to_all"), 0.0)
    stacks: collections.Counter[tuple[int, ...]] = collections.Counter()
    for row in setup.trained(shape).values():
        numel = math.prod(row.shape)
        if shard_dim(row.shape, row.axes, shards) is None:
            # Without a shard axis no parameter is sharded, and all are reduced over all ranks.
            sent["all_reduce"] += 2 * overall * 4 * numel
            continue
        if setup.mode == "zero2":
            sent["all_gather"] += within * model.storage_dtype(row, setup.dtype).itemsize * numel
            sent["reduce_scatter"] += within * 4 * numel
        else:
            # The backward pass gathers a matrix again; lm_head's gradient is computed in the forward pass.
            gathers = 2 if row.group == MATRIX else 1
            sent["all_gather"] += micro_batches * gathers * within * setup.dtype.itemsize * numel
            sent["reduce_scatter"] += micro_batches * within * 4 * numel
            sent["all_reduce"] += 2 * across * 4 * numel / shards
        if row.group == MATRIX:
            stacks[row.shape] += 1
    muon_size = 2 if setup.dtype == torch.bfloat16 else 4
    for size, n in stacks.items():
        padded = -(-n // shards) * shards
        second = second_shape(size)
        sent["all_to_all"] += within * padded * math.prod(size) / shards * 2 * muon_size
        if any(m % shards == 0 for m in second):
            sent["all_to_all"] += within * padded * math.prod(second) / shards * (4 + 4)
        else:  # every rank holds the full tensor, and receives the others' results
            sent["all_gather"] += within * padded * math.prod(second) * 4
    return sent


def communication_seconds(sent: dict[str, float], setup: Setup, gpu: GpuSpec) -> tuple[float, float]:
    """Return the seconds of a step's collectives: those of every micro-batch, and those once a step.

    A ring over several nodes enters each of them once, over the network of all its GPUs together; reductions between
    the groups of hsdp, and all_to_all across nodes, have the network of each GPU for themselves.
    """
    link, network, node_ranks = gpu.link_bytes_per_second, gpu.network_bytes_per_second, setup.node_ranks

    def ring(ranks: int) -> float:
        return link if ranks <= node_ranks else min(link, network * node_ranks)

    single = link if setup.world_size <= node_ranks else network
    layers = (sent["all_gather"] + sent["reduce_scatter"]) / ring(setup.shards)
    swaps = sent["all_to_all"] / (link if setup.shards <= node_ranks else network)
    reductions = sent["all_reduce"] / (single if setup.mode == "hsdp" else ring(setup.world_size))
    every = setup.mode in ("fsdp", "hsdp")
    return (layers if every else 0.0), swaps + reductions + (0.0 if every else layers)


# Time and cost


class Estimate(NamedTuple):
    """What a run on given GPUs takes."""

    rows: int  # of a micro-batch
    traffic: dict[str, float]
    compute_seconds: float  # of a step: matrix products at the given MFU
    exposed_seconds: float  # of a step: communication that is not hidden
    tokens_per_second: float  # of the job, as hours and dollars
    hours: float
    dollars: float


def estimate(
    shape: ModelConfig,
    plan: Plan,
    gpu: GpuSpec,
    setup: Setup,
    *,
    mfu: float = MFU,
    rows: int | None = None,
    dollars_per_hour: float | None = None,
) -> Estimate | None:
    """Return batch, time and cost of a run, or None if it does not fit.

    Collectives of every micro-batch (fsdp, hsdp) overlap with computation as long as that lasts; those once a step do
    not overlap.

    Args:
        mfu: share of the GPU's 16-bit peak. rows: of a micro-batch; default: the most that fit.
        dollars_per_hour: of one GPU; default: the table's.
    """
    rows_per_rank = plan.total_batch_size // (shape.sequence_len * setup.world_size)
    capacity = int(gpu.memory_gib * GIB)
    rows = rows or largest_batch(shape, setup, rows_per_rank, capacity)
    if rows is None:
        return None
    micro_batches = rows_per_rank // rows
    if not fits(memory(shape, setup, rows=rows, micro_batches=micro_batches), capacity):
        return None
    sent = traffic(shape, setup, micro_batches=micro_batches)
    peak_flops = gpu.half_flops if setup.dtype.itemsize == 2 else gpu.single_flops
    compute = plan.flops_per_token * plan.total_batch_size / setup.world_size / (mfu * peak_flops)
    every_micro_batch, once = communication_seconds(sent, setup, gpu)
    exposed = once + max(every_micro_batch - compute, 0.0)
    seconds = compute + exposed
    hours = plan.num_steps * seconds / 3600
    dollars = hours * setup.world_size * (gpu.dollars_per_hour if dollars_per_hour is None else dollars_per_hour)
    return Estimate(rows, sent, compute, exposed, plan.total_batch_size / seconds, hours, dollars)
