"""What the compiler makes of the collectives of a sharded loss: the order of starts, products and waits.

Inductor's passes run here as on a GPU, with fixed times in place of measured ones; the graph that comes out is recorded
and then run as it is, node by node, on two gloo ranks, so its gradients can be compared.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import ranks
import small_model
import torch
import torch._inductor.compile_fx as inductor
import torch._inductor.config
import torch._inductor.fx_passes.overlap_scheduling as overlap_scheduling
import torch.utils._runtime_estimation as estimation
from torch._guards import detect_fake_mode
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V

from nanochat import distributed, model, transform, tree
from nanochat.distributed import ShardingConfig, compile, sharding
from nanochat.model import Compute, ModelConfig, loss

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(sequence_len=32, vocab_size=128, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
COLLECTIVE_MS, PRODUCT_MS = 0.3, 0.1


def milliseconds(node: torch.fx.Node, size: int | None = None) -> float | None:
    """Return what the pass is to believe: a collective takes as long as three products."""
    if "c10d" in str(node.target):
        return 0.0 if "wait_tensor" in str(node.target) else COLLECTIVE_MS
    return PRODUCT_MS if overlap_scheduling.is_compute_node(node) else 0.0


def kind(graph: torch.fx.GraphModule, node: torch.fx.Node) -> str | None:
    """Return gather, scatter, wait or product for a node that is one, also where it is wrapped to keep its place."""
    target = str(node.target)
    if target == "control_deps":
        body = getattr(graph, str(getattr(node.args[1], "target", "")))
        target = " ".join(str(inner.target) for inner in body.graph.nodes)
    for name, part in {"gather": "all_gather_into", "scatter": "reduce_scatter_t", "wait": "wait_tensor"}.items():
        if f"_c10d_functional.{part}" in target:
            return name
    return "product" if "aten.mm." in target or "attention" in target else None


def hidden_behind(graph: torch.fx.GraphModule) -> list[tuple[str, int]]:
    """Return, for each collective in order of its start, its kind and the number of products before its wait."""
    kinds = {node: kind(graph, node) for node in graph.graph.nodes}
    nodes, rows = list(kinds), []
    for start, node in enumerate(nodes):
        if kinds[node] in ("gather", "scatter"):
            # A wrapped wait has what it must follow among its arguments; its own collective is the last of them.
            wait = next(user for user in node.users if kinds[user] == "wait" and user.args[-1] is node)
            between = [kinds[other] for other in nodes[start : nodes.index(wait)]]
            rows.append((kinds[node], between.count("product")))
    return rows


def call_in_place(_: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
    return body(*args, **kwargs)


@contextlib.contextmanager
def recorded(graphs: list[Any]) -> Iterator[None]:
    """Within, graphs go through Inductor's passes, into `graphs`, and are run by torch's own kernels."""

    def lower(graph: torch.fx.GraphModule, inputs: Any, is_inference: bool = False, **_: Any) -> Any:
        before = hidden_behind(graph)
        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad_passes(graph, is_inference)
        graphs.append((before, hidden_behind(graph)))
        for node in graph.graph.nodes:
            if str(node.target) == "control_deps":  # Inductor lowers it; torch has no kernel for it in every version
                node.target = call_in_place
        graph.recompile()

        def run(args: list[Any]) -> Any:
            return graph(*args)

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
        return run

    whole = inductor.compile_fx

    def compile_fx(graph: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not args:  # the outermost call
            kwargs.setdefault("inner_compile", lower)
        return whole(graph, inputs, *args, **kwargs)

    options = compile.overlap_options()
    options["aten_distributed_optimizations.custom_runtime_estimation"] = milliseconds
    with (
        mock.patch.object(inductor, "compile_fx", compile_fx),
        mock.patch.object(compile, "overlap_options", lambda: options),
        mock.patch.object(estimation, "get_gpu_dram_gbps", lambda: 3350),
        mock.patch.object(estimation, "get_device_tflops", lambda dtype: 989.0),
        mock.patch.object(overlap_scheduling, "estimate_runtime_analytical", milliseconds, create=True),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        yield


def compile_with_overlap() -> dict[str, Any]:
    """Compile the sharded loss with and without overlap; return the orders and the errors."""
    logging.disable(logging.WARNING)
    runtime = distributed.init("cpu")
    spec = model.spec(CONFIG)
    sharding_plan = sharding.make_plan(ShardingConfig("fsdp"), runtime, spec)
    assert sharding_plan
    params = tree.unflatten(
        {n: sharding.place(sharding_plan, n, x) for n, x in tree.flatten(small_model.random_params(CONFIG)).items()}
    )
    params = sharding.gather(sharding_plan, params, torch.float32)
    batch = small_model.random_batch(CONFIG, rows=2, seed=runtime.rank)
    compute = Compute(all_gather=sharding.gather_layer(sharding_plan, torch.float32))
    f = functools.partial(loss.next_token, config=CONFIG, compute=compute, chunk_tokens=64)
    eager, _ = transform.value_and_grad(f, has_aux=True)(params, batch)
    graphs: list[Any] = []
    with recorded(graphs):
        f = compile.compile_fn(f, overlap=True)
        grads, _ = transform.value_and_grad(f, has_aux=True)(params, batch)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(tree.leaves(grads), tree.leaves(eager)))
    worst = max(distributed.all_reduce_sum([worst]))
    distributed.close()
    return {"graphs": graphs, "worst": worst}


def test_collectives_of_a_layer_run_beside_the_products_of_the_next() -> None:
    results = ranks.call(2, compile_with_overlap)[0]
    assert results["worst"] < 1e-5, "gradients of the reordered graph differ from the eager ones"
    (before, forward), (before_backward, backward) = results["graphs"]
    assert {n for _, n in before + before_backward} == {0}, "without the pass nothing runs beside a collective"
    gathers = [n for _, n in forward]
    again, scatters = ([n for what, n in backward if what == wanted] for wanted in ("gather", "scatter"))
    tables = 2 + sum(map(CONFIG.has_value_embed, range(CONFIG.n_layer)))  # of tokens, of the head, of values
    assert len(gathers) == len(scatters) == CONFIG.n_layer + tables, "a layer is one collective, its table another"
    assert len(again) == CONFIG.n_layer, "the layers are gathered again; the tables are not needed"
    assert all(n >= COLLECTIVE_MS / PRODUCT_MS for n in gathers[2:]), gathers  # the first two have nothing before them
    assert all(n > 0 for n in again[1:]), again
    assert max(gathers + again) <= 1.25 * compile.PREFETCH_PRODUCTS  # whole layers take memory: not much earlier
    assert all(n >= COLLECTIVE_MS / PRODUCT_MS for n in scatters[:-2]), scatters  # nothing comes after the last
