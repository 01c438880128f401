"""How a step's functions are compiled: which options, and why.

In a compiled graph each collective is followed at once by its wait. Inductor's overlap pass moves the start up and the
wait down, within the limits below. Source: SimpleFSDP (arXiv 2411.00284).
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config

from nanochat.config import UserError

P = ParamSpec("P")
R = TypeVar("R")

# A layer has about 9 matrix products forward and 18 backward: the next layer's gather starts within the layer before
# it, not earlier, because every gathered layer takes memory.
PREFETCH_PRODUCTS = 20
# Memory for pending collectives: their buffers live until the wait, and those of a reduction are the full gradients in
# float32. Without a limit the waits move to the end of the graph, and all buffers live at once.
IN_FLIGHT_GB = 1.0
# Collectives considered for each matrix product: more only takes time.
CANDIDATES = 16
# Graphs that one function may have in a process, for all shapes of its arguments and all models. torch's limit is 8,
# beyond which it raises; decoding alone needs 10 for a context of 2,048: by rows, span within the rings, and draws.
GRAPHS = 64


def compile_fn(
    f: Callable[P, R], *, overlap: bool = False, memory_budget: float = 1.0, dynamic: bool | None = False
) -> Callable[P, R]:
    """Return `f` compiled as one graph per shape.

    Args:
        f: a pure function of tensors; gradients are taken outside of it (`transform.value_and_grad`).
        overlap: overlap the collectives of `f` with its computation, on CUDA; all ranks must compile the same.
        memory_budget: share of the activations that the backward keeps, from 0 (recompute all) to 1 (keep what a plain
            compile keeps); the cheapest to recompute go first. Results stay the same.
        dynamic: None: a size that varies becomes symbolic, so that a third value needs no third graph.
    """
    if not 0 <= memory_budget <= 1:
        raise UserError(f"memory_budget={memory_budget}: expected 0 (recompute all) … 1 (keep all)")
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    # Shapes that vary get a graph each: symbolic ones made a sharded graph compile six times slower.
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, options=overlap_options() if overlap else None)
    if memory_budget == 1:
        return compiled

    @functools.wraps(f)
    def within_budget(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._functorch.config.patch(activation_memory_budget=memory_budget):  # read when a shape is compiled
            return compiled(*args, **kwargs)

    return within_budget


def overlap_options() -> dict[str, Any]:
    """Return Inductor's options for overlapping collectives with the computation, by the installed version of torch."""
    settings = {
        "enable_overlap_scheduling": True,
        "insert_overlap_deps": True,  # or the scheduler, which comes later, could undo the order
        "collective_bucketing": False,  # the function does it
        "max_compute_pre_fetch": PREFETCH_PRODUCTS,
        "max_in_flight_gb": IN_FLIGHT_GB,
        "max_coll_distance": CANDIDATES,
        "collective_estimator": "analytical",
    }
    prefix = "aten_distributed_optimizations."
    options: dict[str, Any] = {prefix + name: value for name, value in settings.items()}
    # With formulas for the times all ranks find the same order. Older versions of torch measure products, and the ranks
    # talk while they compile, to agree: one that had its graph from the cache would leave the others waiting.
    known = torch._inductor.config.get_config_copy()
    if prefix + "compute_estimator" not in known:
        return options | {"fx_graph_cache": False}
    return options | {prefix + "compute_estimator": "analytical", prefix + "pre_bucketing_fsdp_collectives": False}
