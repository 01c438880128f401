"""The gradient of pure functions for training: the contract of `torch.func` by way of `torch.autograd.grad`.

`torch.func` fails on DTensor leaves, activation checkpointing and flex_attention, and when compiled it ignores a custom
backward that is not wrapped for it (`torch.compiler.allow_in_graph`).
"""

from collections.abc import Callable
from typing import Any

import torch

from nanochat import tree


def value_and_grad(f: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """Return a function that computes the gradient and the value of `f` with respect to its first argument.

    The contract, and the order of results, are those of `torch.func.grad_and_value`: (grads, value), or
    (grads, (value, aux)) with `has_aux`. `grads` has the structure of the first argument, a tree of floating-point
    tensors, with zeros where `f` does not depend on a leaf. The arguments are not changed, and nothing returned is
    attached to a graph. `f` returns a 0-d tensor, or (0-d tensor, aux) with `has_aux`; it may be compiled.
    """

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # Fresh leaves: the caller's tensors keep their requires_grad and never get a .grad.
        params = tree.map(lambda p: p.detach().requires_grad_(), params)
        with torch.enable_grad():
            out = f(params, *args, **kwargs)
        value, aux = out if has_aux else (out, None)
        if value.dim():
            raise ValueError(f"value_and_grad: the function returned shape {tuple(value.shape)}, expected a 0-d tensor")
        leaves = tree.leaves(params)
        if value.requires_grad:
            flat = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        else:  # it does not depend on any of them
            flat = [torch.zeros_like(p) for p in leaves]
        iterator = iter(flat)
        grads = tree.map(lambda _: next(iterator), params)
        detached = tree.map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (value, aux))
        return grads, (detached if has_aux else detached[0])

    return wrapped
