"""The kernels that Inductor writes for a training step on an H100, counted on a machine without a GPU.

    python -m experiments._codegen 4            # layers; needs a torch built with CUDA, and triton
    python -m experiments._codegen 2 fp8 code   # linear layers; folder for the code of both graphs

The loss is differentiated with fake CPU tensors, as autograd asks the driver about CUDA ones; its two graphs are then
moved to a fake device, written for sm_90, and not run. Bytes are what Inductor's scheduler expects a kernel to move.
"""

import collections
import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.compile_fx as inductor
from torch._guards import detect_fake_mode
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

from nanochat import distributed, model, train, tree
from nanochat.config import UserError
from nanochat.model import Compute, ModelConfig, attention, linear

H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip
ANSWERS = {  # of torch.cuda to what Inductor asks while it writes code
    "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "_lazy_init": lambda: None,
    "_get_device_properties": lambda *_: H100, "get_device_capability": lambda *_: (9, 0),
    "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8), "set_rng_state": lambda *_: None,
    "_exchange_device": lambda *_: 0, "_maybe_exchange_device": lambda *_: 0, "synchronize": lambda *_: None,
}  # fmt: skip


class Graph(NamedTuple):
    """The code of a compiled graph, and for each kind of kernel how many there are and the bytes that they move."""

    code: str
    kernels: collections.Counter[str]  # by kind: triton, or the name of an external function
    nbytes: collections.Counter[str]


class _NotRun(Exception): ...


@contextlib.contextmanager
def recorded(graphs: list[Graph]) -> Iterator[None]:
    """Within, compiled functions are written for an H100 into `graphs`; calling one raises `_NotRun`."""
    if not (torch.version.cuda and importlib.util.find_spec("triton")):
        raise UserError(f"torch {torch.__version__} writes no CUDA code: install a build with CUDA, and triton")
    compiler: Any = inductor._InProcessFxCompile
    lower, cuda = compiler.codegen_and_compile, torch.device("cuda", 0)

    def on_cuda(self: Any, graph: torch.fx.GraphModule, inputs: Any, *args: Any) -> Any:
        for node in graph.graph.nodes:
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs), lambda x: cuda if isinstance(x, torch.device) else x
            )
        graph.recompile()
        with detect_fake_mode(inputs):  # pyright: ignore[reportOptionalContextManager]
            moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=cuda) for x in inputs]
        return lower(self, graph, moved, *args)

    def compile_to_module(self: GraphLowering) -> Any:
        graphs.append(Graph(self.codegen()[0].value, collections.Counter(), collections.Counter()))  # pyright: ignore
        for node in self.scheduler.nodes:
            kind = getattr(node.node, "python_kernel_name", None) if node.is_extern() else "triton"
            if kind and not isinstance(node, NopKernelSchedulerNode):  # views of results are external and have no name
                graphs[-1].kernels[kind] += 1
                graphs[-1].nbytes[kind] += node.get_read_write_buffers_sizes()
        return types.SimpleNamespace(call=mock.Mock(side_effect=_NotRun), __file__="", runner=None)

    with (
        mock.patch.multiple(torch.cuda, create=True, **ANSWERS),
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None),
        mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: "sm_90"),
        mock.patch.object(compiler, "codegen_and_compile", on_cuda),
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
        inductor.config.patch(force_disable_caches=True, compile_threads=1),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield


def training_graphs(config: ModelConfig, name: str = "dense", *, cast_once: bool = True) -> list[Graph]:
    """Return forward and backward of 8 sequences in bfloat16; `cast_once`: of matrices that the step has cast."""
    graphs: list[Graph] = []
    params = tree.flatten(model.init(config, 0, device="meta", dtype=torch.bfloat16))
    if cast_once:
        matrices = [n for n, row in model.spec(config).items() if row.matmul and row.group != "unembedding"]
        params |= {n: params[n].to(torch.bfloat16) for n in matrices}
    compute = Compute(dtype=torch.bfloat16, attend=attention.flash, linear=getattr(linear, name))
    loss_fn = functools.partial(model.loss.next_token, config=config, chunk_tokens=8192, compute=compute)
    with FakeTensorMode(), recorded(graphs), contextlib.suppress(_NotRun):
        fake = tree.unflatten({n: torch.empty(x.shape, dtype=x.dtype) for n, x in params.items()})
        batch = {key: torch.empty(8, config.sequence_len, dtype=torch.int64) for key in ("inputs", "targets")}
        train.step.gradient(loss_fn, compile=distributed.compile_fn)(fake, batch, torch.empty(()))
    return graphs


if __name__ == "__main__":
    depth, name, out = [*sys.argv[1:], *("4", "dense", "")[len(sys.argv) - 1 :]]
    shape = ModelConfig(n_layer=int(depth), n_head=10, n_kv_head=10, n_embd=1280)  # the width of depth 20
    for cast_once in (False, True) if name == "dense" else (False,):
        for direction, graph in zip(("forward", "backward"), training_graphs(shape, name, cast_once=cast_once)):
            label = f"{direction}, matrices in {'bfloat16' if cast_once else 'float32'}"
            kinds = [f"{n} {kind} {graph.nbytes[kind] / 1e9:.3f} GB" for kind, n in graph.kernels.items()]
            print(f"{label}: {', '.join(kinds)}")
            if out:
                Path(out, f"{label}.py").write_text(graph.code)
