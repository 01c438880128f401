"""Memory of one micro-batch and of one update, operation by operation, at any width, batch, depth and vocabulary.

No formula for this model: the loss itself is traced without memory (`liveness`) at two small depths, and what is held
at every operation is continued linearly to the asked depth. Sizes come from the dimensions that the traced shapes
consist of, so one pair of traces serves all widths, batches and vocabularies.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat import linear as linears
from nanochat import liveness, loss, model, optim, tree
from nanochat.liveness import Timeline
from nanochat.model import Compute, ModelConfig

PARTS = ("activations", "logits", "gradients", "weights")


class Trace(NamedTuple):
    """Buffers of one micro-batch's forward and backward pass, and what the numbers in their shapes stand for."""

    timeline: Timeline
    names: dict[int, str]


# Sizes of the traced model: so chosen that every number that turns up in a shape says which dimension it is, in a
# proportion that real ones have, and divisible as fp8 and eight chunks want it.
ROWS, TIME, HEADS, HEAD_DIM, VOCAB, CHUNKS = 13, 1920, 11, 112, 33000, 8


@functools.lru_cache(maxsize=64)
def _trace(n_layer: int, groups: int, dtype: torch.dtype, use_fp8: bool, chunks: int, gathered: bool) -> Trace:
    """Trace the loss of a model of reference sizes; `groups` are query heads for each key head."""
    shape = ModelConfig(TIME, VOCAB, n_layer, HEADS * groups, HEADS, HEADS * groups * HEAD_DIM, "L")
    chunk_tokens = ROWS * TIME // chunks
    timeline = trace_loss(shape, ROWS, dtype, fp8=use_fp8, chunk_tokens=chunk_tokens, gathered=gathered)
    return Trace(timeline, {size: name for name, size in reversed(_dimensions(shape, ROWS, chunk_tokens).items())})


def trace_loss(
    shape: ModelConfig, rows: int, dtype: torch.dtype, *, fp8: bool, chunk_tokens: int, gathered: bool
) -> Timeline:
    """Return the buffers of one micro-batch's forward and backward pass, traced at the full depth of `shape`.

    Args:
        shape: the model. rows: of the micro-batch. dtype: of the computation. fp8, chunk_tokens: of the loss.
        gathered: whether the parameters come in the compute dtype, as a gather gives them.
    """
    linear = linears.fp8 if fp8 else linears.dense
    how = Compute(dtype=dtype, attend=_attend, linear=linear, gather=lambda parts: dict(parts))
    with liveness.fake():
        flat = {}
        for name, row in model.spec(shape).items():
            kept = model.storage_dtype(row, dtype) if not gathered or row.axes[0] in ("layer", "one") else dtype
            flat[name] = torch.empty(row.shape, dtype=kept, requires_grad=True)
        ids = torch.empty((rows, shape.sequence_len), dtype=torch.int64)

        def f(inputs: Tensor, targets: Tensor, *leaves: Tensor) -> Tensor:
            params: Any = tree.nest(dict(zip(flat, leaves)))
            batch = {"inputs": inputs, "targets": targets}
            return loss.next_token(params, batch, config=shape, compute=how, chunk_tokens=chunk_tokens)[0]

        return liveness.training(f, [ids, ids.clone(), *flat.values()])


def _attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, _window: int) -> Tensor:
    """Attention as memory sees it: flash and flex kernels keep q, k, v, the output and a float32 number per row.

    Every layer counts as a full one: windows save time, not memory. The traced operation is the CPU's, which wants
    as many key heads as query heads: of grouped queries the estimate is high.
    """
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    if groups > 1:
        k_BTKH, v_BTKH = k_BTKH.repeat_interleave(groups, 2), v_BTKH.repeat_interleave(groups, 2)
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0].transpose(1, 2)


def _dimensions(shape: ModelConfig, rows: int, chunk_tokens: int) -> dict[str, int]:
    """Return every size that a shape in the loss of a model can have, by name; the first of equal ones counts."""
    time, tokens = shape.sequence_len, rows * shape.sequence_len
    return {
        "one": 1,
        "tokens": tokens,
        "chunk": min(chunk_tokens, tokens),
        "rows": rows,
        "time": time,
        "time - 1": time - 1,
        "rows x (time - 1)": rows * (time - 1),
        "width": shape.n_embd,
        "hidden": 4 * shape.n_embd,
        "kv width": shape.n_kv_head * shape.head_dim,
        "heads": shape.n_head,
        "kv heads": shape.n_kv_head,
        "head": shape.head_dim,
        "half a head": shape.head_dim // 2,
        "padded vocabulary": shape.padded_vocab,
        "vocabulary": shape.vocab_size,
        "groups": shape.n_head // shape.n_kv_head,
        "smear": model.SMEAR_WIDTH,
        "gate": model.VALUE_GATE_WIDTH,
        "layers": shape.n_layer,
    }


TOKEN_NAMES = {"tokens", "chunk", "rows", "time", "time - 1", "rows x (time - 1)"}


def curves(
    shape: ModelConfig, rows: int, dtype: torch.dtype, fp8: bool, chunk_tokens: int, shards: int, gathered: bool
) -> tuple[dict[str, np.ndarray], int]:
    """Return bytes by part at every operation of forward and backward, and the number of forward operations."""
    chunks = 1 if rows * shape.sequence_len <= chunk_tokens else CHUNKS
    how = (shape.n_head // shape.n_kv_head, dtype, fp8, chunks, gathered)
    low = min(shape.n_layer, 4 - shape.n_layer % 2)  # every second layer has a value embedding: steps of two
    dims = _dimensions(shape, rows, chunk_tokens)
    small = _trace(low, *how)
    near, middle = _live(small, dims, shards, gathered), small.timeline.forward_steps
    more = (shape.n_layer - low) // 2
    if not more:
        return near, middle
    large = _trace(low + 2, *how)
    far = _live(large, dims, shards, gathered)

    at = np.concatenate(
        [
            _aligned(small.timeline.labels[:middle], large.timeline.labels[: large.timeline.forward_steps]),
            large.timeline.forward_steps
            + _aligned(small.timeline.labels[middle:], large.timeline.labels[large.timeline.forward_steps :]),
        ]
    )
    return {key: near[key] + more * (far[key][at] - near[key]) for key in near}, middle


def _aligned(short: list[str], long: list[str]) -> np.ndarray:
    """Return for every operation of a pass the same one in that of a deeper model.

    The first half is counted from the start, the rest from the end; what is in between, as a block (the loss, where
    work for every layer follows it), is looked up.
    """
    common = (n for n, (a, b) in enumerate(zip(short, long)) if a != b)
    head = min(next(common, len(short)), len(short) // 2)
    differing = (n for n, (a, b) in enumerate(zip(reversed(short), reversed(long))) if a != b)
    tail = min(next(differing, len(short)), len(short) - head)
    block = short[head : len(short) - tail]
    last = len(long) - tail - len(block)
    start = next((i for i in range(last, head - 1, -1) if long[i : i + len(block)] == block), None)
    if start is None:
        raise RuntimeError("planner: the graphs of two depths do not match")
    parts = (range(head), range(start, start + len(block)), range(len(long) - tail, len(long)))
    return np.concatenate([np.array(part, dtype=int) for part in parts])


def _live(trace: Trace, dims: dict[str, int], shards: int, gathered: bool) -> dict[str, np.ndarray]:
    """Return bytes by part at every operation, at the asked dimensions."""
    end = trace.timeline.steps
    change = {key: np.zeros(end + 1) for key in PARTS}

    def hold(key: str, nbytes: float, first: int, last: int) -> None:
        if last >= first:
            change[key][first] += nbytes
            change[key][last + 1] -= nbytes

    for buffer in trace.timeline.buffers:
        names = [_name(trace, size) for size in buffer.sizes]
        numel = math.prod(dims[name] for name in names)
        tokens = TOKEN_NAMES & set(names)
        if buffer.role == "input":
            if gathered and not tokens:  # a parameter: gathered before its first use, freed after its last
                hold("weights", buffer.itemsize * numel, buffer.first, buffer.last)
        elif buffer.role == "result" and names:
            if gathered:  # reduced to this rank's part in float32
                hold("weights", buffer.itemsize * numel, buffer.first, buffer.first)
                hold("gradients", 4 * numel / shards, buffer.first, end - 1)
            else:
                hold("gradients", buffer.itemsize * numel, buffer.first, buffer.last)
        else:
            vocab = tokens and {"vocabulary", "padded vocabulary"} & set(names)
            key = "logits" if vocab else "activations" if tokens else "weights"
            hold(key, buffer.itemsize * numel, buffer.first, buffer.last)
    return {key: np.cumsum(x)[:-1] for key, x in change.items()}


def _name(trace: Trace, size: int) -> str:
    if size not in trace.names:
        raise RuntimeError(f"planner: the traced loss has a dimension of {size}; say in _dimensions what it is")
    return trace.names[size]


def second_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of Muon's running mean squares."""
    found = list(shape)
    found[optim.reduced_axis(shape)] = 1
    return tuple(found)


@functools.lru_cache(maxsize=16)
def muon_bytes_per_element(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Return bytes per element of a stack that one update by Muon holds at its fullest, its own stacks included."""
    n = 2
    with liveness.fake():
        p, g, momentum = (torch.empty(n, rows, columns) for _ in range(3))
        second = torch.empty(n, *second_shape((rows, columns)))
        h = {name: torch.empty(()) for name in ("lr", "momentum", "beta2", "weight_decay")}
        scale, keep = torch.empty(()), torch.empty((), dtype=torch.bool)
        half = dtype if dtype == torch.bfloat16 else None
        names = list(h)

        def f(p: Tensor, g: Tensor, m: Tensor, second: Tensor, scale: Tensor, keep: Tensor, *values: Tensor) -> Any:
            return optim.muon(p, g, m, second, dict(zip(names, values)), scale, keep, half)

        timeline = liveness.inference(f, [p, g, momentum, second, scale, keep, *h.values()])
    live = np.zeros(timeline.steps + 1)
    for b in timeline.buffers:
        if b.role != "input":
            live[b.first] += b.itemsize * math.prod(b.sizes)
            live[b.last + 1] -= b.itemsize * math.prod(b.sizes)
    return 3 * 4 + float(np.cumsum(live).max()) / (n * rows * columns)
