"""Which buffers a compiled function allocates, and from when to when, found without running it.

The function is traced on FakeTensors, which have a shape and no memory, through AOTAutograd with Inductor's
decompositions and its min-cut partitioner: what torch.compile does before it writes kernels. What Inductor then fuses
is followed by its own rules: a chain of pointwise operations has no buffers inside; a buffer is written where a library
kernel, a reduction or the caller needs it, or where a chain would read too many others; a kernel may write its result
over an input that is not needed again.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

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


class Timeline(NamedTuple):
    """The buffers of a function: forward steps 0 … forward_steps - 1, backward up to steps - 1; results outlive it.

    An input has one buffer for the forward and one for the backward pass, from its first use in there to the last.
    `labels` names the operation of every step.
    """

    buffers: list[Buffer]
    forward_steps: int
    steps: int
    labels: list[str]


def training(f: Callable[..., Tensor], args: Sequence[Tensor]) -> Timeline:
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


def inference(f: Callable[..., Any], args: Sequence[Any]) -> Timeline:
    """Return the buffers of `f` without a backward pass, for fake tensors as in `training`."""
    from torch._inductor.decomposition import select_decomp_table

    with torch.no_grad():
        graph = make_fx(f, decomposition_table=select_decomp_table())(*args).graph
    graph.eliminate_dead_code()
    values = _Values(graph, donated=frozenset())
    end = values.steps
    return Timeline([b for _, b in values.buffers(0, end - 1, "result")], end, end, values.labels())


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


def fake() -> FakeTensorMode:
    """Return a mode under which tensors have shapes and no memory."""
    return FakeTensorMode()


def _joined(forward: fx.Graph, backward: fx.Graph) -> Timeline:
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
    return Timeline(buffers, middle, end, first.labels() + second.labels())


def _name(node: fx.Node) -> str:
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
            computes = n.op == "call_function" and self.root(n) is n and _name(n) != "getitem"
            steps += computes
            step[n] = max(steps - 1, 0)
        return step, max(steps, 1)

    def labels(self) -> list[str]:
        """Return a word for each step: its operation."""
        found = [""] * self.steps
        for n in self.nodes:
            if n.op == "call_function" and self.root(n) is n and _name(n) != "getitem":
                found[self.step[n]] = _name(n)
        return found

    def root(self, node: fx.Node) -> fx.Node:
        """Return the node whose memory `node` looks at."""
        while node.op == "call_function":
            name = _name(node)
            source = node.args[0] if node.args else None
            if name == "getitem" and isinstance(source, fx.Node) and _name(source) not in VIEWS:
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
        if node.op != "call_function" or _name(node) == "getitem":
            return False
        tags = getattr(node.target, "tags", ())
        return torch.Tag.pointwise in tags or _name(node) in FUSED or _name(node) in REDUCTIONS

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
            if not self.fused(n) or _name(n) in REDUCTIONS or n in self.outputs or n in needed or crowded:
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
            if n not in self.written or not (self.fused(n) or _name(n) in SCATTERS):
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
            elif _name(n) == "getitem":
                first = start + self.step[n.all_input_nodes[0]]
            yield n, Buffer(tuple(value.shape), value.element_size(), first, last, role)


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size()
