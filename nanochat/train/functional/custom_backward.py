"""Kernels whose custom backward `torch.func` sees."""

from typing import Any

import torch
from torch import Tensor

from nanochat.model import Attend


def with_visible_backward(attend: Attend) -> Attend:
    """Return a kernel with a custom backward of its own in a form that `torch.func.grad` sees, compiled or not.

    The backward computes the forward again, to run the kernel's own backward on it. First derivatives only.
    """

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                out = attend(leaves[0], leaves[1], leaves[2], window)
            return torch.autograd.grad(out, leaves, grad)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            return attend(q, k, v, window)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, ctx.window = inputs
            ctx.save_for_backward(*tensors)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
            grads: Any = Backward.apply(*ctx.saved_tensors, grad, ctx.window)
            return *grads, None

    @torch.compiler.allow_in_graph
    def call(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return Forward.apply(q, k, v, window)  # pyright: ignore

    return call
