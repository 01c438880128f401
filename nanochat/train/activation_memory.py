"""Which buffers a compiled function allocates, and from when to when, found without running it.

The function is traced on FakeTensors, which have a shape and no memory, through AOTAutograd with Inductor's
decompositions and its min-cut partitioner: what torch.compile does before it writes kernels. What Inductor then fuses
is followed by its own rules: a chain of pointwise operations has no buffers inside; a buffer is written where a library
kernel, a reduction or the caller needs it, or where a chain would read too many others; a kernel may write its result
over an input that is not needed again.

Memory of one micro-batch and of one update, operation by operation, at any width, batch, depth and vocabulary.

No formula for this model: the loss itself is traced without memory (`liveness`) at two small depths, and what is held
at every operation is continued linearly to the asked depth. Sizes come from the dimensions that the traced shapes
consist of, so one pair of traces serves all widths, batches and vocabularies.
"""

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from nanochat import model, optim, tree
from nanochat.model import Compute, ModelConfig, loss
from nanochat.model import linear as linears

# Results that only look at another tensor's memory.
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "permute",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "squeeze",
        "unsqueeze",
        "alias",
    ),
    *("as_strided", "detach", "split", "split_with_sizes", "unbind", "reshape", "view_of", "unfold", "diagonal"),
}
# Fused although torch does not tag them as pointwise.
FUSED = {
    *("embedding", "gather", "index", "index_select", "cat", "full", "full_like", "zeros", "zeros_like", "ones"),
    *("ones_like", "empty", "empty_like", "new_zeros", "new_ones", "new_full", "arange", "iota", "scalar_tensor"),
    *("convert_element_type", "clone", "copy", "constant_pad_nd", "slice_scatter", "select_scatter", "where", "stack"),
    *("fill", "_to_copy", "lift_fresh_copy", "pow", "clamp", "clamp_min", "clamp_max", "broadcast_in_dim"),
}
# Fused with what they read, but their results are always written: they are small.
REDUCTIONS = {"sum", "mean", "amax", "amin", "any", "all", "prod", "var", "var_mean", "argmax", "max", "min"}
SCATTERS = {"index_put", "_unsafe_index_put", "scatter", "scatter_add", "index_add", "embedding_dense_backward"}


class Buffer(NamedTuple):
    """Memory that is held over some steps of a graph, a step being one operation.

    Attributes:
        sizes, itemsize: shape and bytes of an element. first, last: steps, both included.
        role: input; saved (made in the forward pass, needed in the backward); result; temporary.
    """

    sizes: tuple[int, ...]
    itemsize: int
    first: int
    last: int
    role: str


class BufferLifetimes(NamedTuple):
    """The buffers of a function: forward steps 0 … forward_steps - 1, backward up to steps - 1; results outlive it.

    An input has one buffer for the forward and one for the backward pass, from its first use in there to the last.
    `labels` names the operation of every step.
    """

    buffers: list[Buffer]
    forward_steps: int
    steps: int
    labels: list[str]


def training(f: Callable[..., Tensor], args: Sequence[Tensor]) -> BufferLifetimes:
    """Return the buffers of `f`'s forward and backward pass.

    Args:
        f: from fake tensors to a 0-d loss. args: made under a FakeTensorMode; those that require a gradient get one.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor | None]:
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in primals]
        loss = f(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        return [loss, *torch.autograd.grad(loss, wanted, tangents, allow_unused=True)]

    # The partitioner tells the inputs apart by these argument names, as AOTAutograd gives them.
    with _without_garbage_collection():
        traced = make_fx(joint, decomposition_table=select_decomp_table())(list(args), [torch.empty(())])
        forward, backward = min_cut_rematerialization_partition(traced, None, compiler="inductor", num_fwd_outputs=1)
        return _joined(forward.graph, backward.graph)


def inference(f: Callable[..., Any], args: Sequence[Any]) -> BufferLifetimes:
    """Return the buffers of `f` without a backward pass, for fake tensors as in `training`."""
    from torch._inductor.decomposition import select_decomp_table

    with torch.no_grad():
        graph = make_fx(f, decomposition_table=select_decomp_table())(*args).graph
    graph.eliminate_dead_code()
    values = _Values(graph, donated=frozenset())
    end = values.steps
    return BufferLifetimes([b for _, b in values.buffers(0, end - 1, "result")], end, end, values.labels())


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Within, Python looks for no cycles: among a graph's many nodes that takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def fake_mode() -> FakeTensorMode:
    """Return a mode under which tensors have shapes and no memory."""
    return FakeTensorMode()


def _joined(forward: fx.Graph, backward: fx.Graph) -> BufferLifetimes:
    first = _Values(forward, donated=frozenset())
    middle = first.steps
    names = {root.name: root for root in first.outputs}
    # A tensor that is saved carries its name over; views of one tensor are one buffer.
    alias = {n.name: first.root(n) for n in forward.nodes}
    saved = {n for n in backward.nodes if n.op == "placeholder" and n.name in alias}
    donated = frozenset(n for n in saved if alias[n.name].op != "placeholder")
    second = _Values(backward, donated=donated, shared={n: alias[n.name].name for n in saved})
    end = middle + second.steps
    buffers = []
    later = {node: b for node, b in second.buffers(middle, end - 1, "result")}
    used_until = {alias[n.name].name: later[n].last for n in saved if n in later}
    for node, b in first.buffers(0, middle - 1, "saved"):
        if b.role == "saved":
            b = b._replace(last=used_until.get(node.name, middle - 1))
        buffers.append(b)
    made_before = {n for n in saved if alias[n.name].name in names and alias[n.name].op != "placeholder"}
    buffers += [b for node, b in later.items() if node not in made_before]
    return BufferLifetimes(buffers, middle, end, first.labels() + second.labels())


def _node_name(node: fx.Node) -> str:
    target: Any = node.target
    return str(target._schema.name).split("::")[-1] if hasattr(target, "_schema") else getattr(target, "__name__", "")


class _Values:
    """What becomes of every value of one graph: a view, a part of a fused kernel, or a buffer."""

    def __init__(self, graph: fx.Graph, donated: frozenset[fx.Node], shared: dict[fx.Node, str] | None = None) -> None:
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        self.donated = donated
        # Placeholders that are views of one saved tensor stand for one buffer.
        owners: dict[str, fx.Node] = {}
        self.owner = {n: owners.setdefault(name, n) for n, name in (shared or {}).items()}
        outputs = next(n for n in graph.nodes if n.op == "output").all_input_nodes
        self.outputs = {self.root(n) for n in outputs}
        self.step, self.steps = self._count()
        self.written, self.reads = self._materialised()
        self.last = self._last_uses()
        self._write_in_place()

    def _count(self) -> tuple[dict[fx.Node, int], int]:
        """Return the step of every node, and the number of steps: inputs, views and parts of a result take none."""
        step, steps = {}, 0
        for n in self.nodes:
            computes = n.op == "call_function" and self.root(n) is n and _node_name(n) != "getitem"
            steps += computes
            step[n] = max(steps - 1, 0)
        return step, max(steps, 1)

    def labels(self) -> list[str]:
        """Return a word for each step: its operation."""
        found = [""] * self.steps
        for n in self.nodes:
            if n.op == "call_function" and self.root(n) is n and _node_name(n) != "getitem":
                found[self.step[n]] = _node_name(n)
        return found

    def root(self, node: fx.Node) -> fx.Node:
        """Return the node whose memory `node` looks at."""
        while node.op == "call_function":
            name = _node_name(node)
            source = node.args[0] if node.args else None
            if name == "getitem" and isinstance(source, fx.Node) and _node_name(source) not in VIEWS:
                return node  # one of several results of an operation
            if (name not in VIEWS and name != "getitem") or not isinstance(source, fx.Node):
                return node
            node = source
        return self.owner.get(node, node)

    def inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the roots that an operation reads."""
        for n in node.all_input_nodes:
            yield self.root(n)

    def fused(self, node: fx.Node) -> bool:
        """Return whether an operation becomes part of a kernel of its neighbours, reductions included."""
        if node.op != "call_function" or _node_name(node) == "getitem":
            return False
        tags = getattr(node.target, "tags", ())
        return torch.Tag.pointwise in tags or _node_name(node) in FUSED or _node_name(node) in REDUCTIONS

    def _materialised(self) -> tuple[set[fx.Node], dict[fx.Node, frozenset[fx.Node]]]:
        """Return the nodes that have a buffer, and for each fused node the buffers that its kernel reads."""
        from torch._inductor import config

        few = config.realize_reads_threshold
        many = config.realize_acc_reads_threshold or config._realize_acc_reads_threshold_default
        roots = [n for n in self.nodes if self.root(n) is n and isinstance(n.meta.get("val"), Tensor)]
        needed = {r for n in self.nodes if not self.fused(n) and self.root(n) is n for r in self.inputs(n)}
        users: dict[fx.Node, int] = {}
        for n in self.nodes:
            if self.root(n) is n:
                for r in set(self.inputs(n)):
                    users[r] = users.get(r, 0) + 1
        written: set[fx.Node] = set()
        reads: dict[fx.Node, frozenset[fx.Node]] = {}
        for n in roots:
            sources = [frozenset({r}) if r in written else reads.get(r, frozenset()) for r in self.inputs(n)]
            reads[n] = frozenset().union(*sources)
            if self.fused(n) and not reads[n] and n not in self.outputs:
                continue  # a constant is written into whatever reads it
            crowded = len(reads[n]) > many or (len(reads[n]) > few and users.get(n, 0) > 1)
            if not self.fused(n) or _node_name(n) in REDUCTIONS or n in self.outputs or n in needed or crowded:
                written.add(n)
        return written, reads

    def _last_uses(self) -> dict[fx.Node, int]:
        """Return the step at which each root is read for the last time, by way of fused operations too."""
        last: dict[fx.Node, int] = {}
        for n in reversed(self.nodes):
            if self.root(n) is not n:
                continue
            inlined = self.fused(n) and n not in self.written
            when = last.get(n, self.step[n]) if inlined else self.step[n]
            for r in self.inputs(n):
                last[r] = max(last.get(r, 0), when)
        return last

    def _write_in_place(self) -> None:
        for n in self.nodes:
            if n not in self.written or not (self.fused(n) or _node_name(n) in SCATTERS):
                continue
            at = self.step[n]
            reads = self.reads[n] if self.fused(n) else [r for r in self.inputs(n) if r in self.written]
            for r in reads:
                mine = r.op != "placeholder" or r in self.donated
                if mine and r not in self.outputs and self.last[r] == at and _nbytes(r) == _nbytes(n):
                    self.last[r] = at - 1
                    break

    def buffers(self, start: int, end: int, output_role: str) -> Iterator[tuple[fx.Node, Buffer]]:
        """Yield every buffer with its node; step 0 of this graph is `start`, and what it returns is held to `end`."""
        for n in self.nodes:
            if n not in self.written or self.owner.get(n, n) is not n:
                continue
            value = n.meta["val"]
            first, last = start + self.step[n], start + self.last.get(n, self.step[n])
            role = "temporary"
            if n.op == "placeholder":
                uses = [self.step[u] for u in n.users if u in self.step]
                first, role = start + min(uses, default=0), "input"
            elif n in self.outputs:
                last, role = end, output_role
            elif _node_name(n) == "getitem":
                first = start + self.step[n.all_input_nodes[0]]
            yield n, Buffer(tuple(value.shape), value.element_size(), first, last, role)


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size()


PARTS = ("activations", "logits", "gradients", "weights")


class Trace(NamedTuple):
    """Buffers of one micro-batch's forward and backward pass, and what the numbers in their shapes stand for."""

    timeline: BufferLifetimes
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
) -> BufferLifetimes:
    """Return the buffers of one micro-batch's forward and backward pass, traced at the full depth of `shape`.

    Args:
        shape: the model. rows: of the micro-batch. dtype: of the computation. fp8, chunk_tokens: of the loss.
        gathered: whether the parameters come in the compute dtype, as a gather gives them.
    """
    linear = linears.fp8 if fp8 else linears.dense
    how = Compute(dtype=dtype, attend=_attend, linear=linear, gather=lambda parts: dict(parts))
    with fake_mode():
        flat = {}
        for name, row in model.spec(shape).items():
            kept = model.storage_dtype(row, dtype) if not gathered or row.axes[0] in ("layer", "one") else dtype
            flat[name] = torch.empty(row.shape, dtype=kept, requires_grad=True)
        ids = torch.empty((rows, shape.sequence_len), dtype=torch.int64)

        def f(inputs: Tensor, targets: Tensor, *leaves: Tensor) -> Tensor:
            params: Any = tree.nest(dict(zip(flat, leaves)))
            batch = {"inputs": inputs, "targets": targets}
            return loss.next_token(params, batch, config=shape, compute=how, chunk_tokens=chunk_tokens)[0]

        return training(f, [ids, ids.clone(), *flat.values()])


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
    with fake_mode():
        p, g, momentum = (torch.empty(n, rows, columns) for _ in range(3))
        second = torch.empty(n, *second_shape((rows, columns)))
        h = {name: torch.empty(()) for name in ("lr", "momentum", "beta2", "weight_decay")}
        scale, keep = torch.empty(()), torch.empty((), dtype=torch.bool)
        half = dtype if dtype == torch.bfloat16 else None
        names = list(h)

        def f(p: Tensor, g: Tensor, m: Tensor, second: Tensor, scale: Tensor, keep: Tensor, *values: Tensor) -> Any:
            return optim.muon(p, g, m, second, dict(zip(names, values)), scale, keep, half)

        timeline = inference(f, [p, g, momentum, second, scale, keep, *h.values()])
    live = np.zeros(timeline.steps + 1)
    for b in timeline.buffers:
        if b.role != "input":
            live[b.first] += b.itemsize * math.prod(b.sizes)
            live[b.last + 1] -= b.itemsize * math.prod(b.sizes)
    return 3 * 4 + float(np.cumsum(live).max()) / (n * rows * columns)
