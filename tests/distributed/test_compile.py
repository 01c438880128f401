"""What `compiling.compile` switches on, and what must not be: the traps of torch.compile that were met."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor

from nanochat.config import UserError
from nanochat.distributed import compile as compiling

LAYERS, ROWS, WIDTH = 3, 64, 32


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(0.3 * torch.randn(WIDTH, WIDTH, generator=generator)).requires_grad_() for _ in range(LAYERS)]


def perceptron(weights: list[Tensor], x: Tensor) -> Tensor:
    for weight in weights:
        x = x + torch.tanh(torch.sin(x @ weight) * torch.sigmoid(x @ weight))
    return x.square().mean()


def gradients_and_saved_bytes(f: Any) -> tuple[tuple[Tensor, ...], int]:
    """Return the gradients of `f`, and the bytes of its activations that lived from the forward to the backward."""
    leaves, x = weights(), torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        if saved.shape[0] == ROWS and saved.data_ptr() != x.data_ptr():
            sizes.append(saved.numel() * saved.element_size())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = f(leaves, x)
    return torch.autograd.grad(loss, leaves), sum(sizes)


def test_a_memory_budget_keeps_less_for_the_backward_and_changes_no_gradient() -> None:
    want, _ = gradients_and_saved_bytes(perceptron)
    saved, whole = {}, torch.compile

    def partitioned(f: Any, options: Any = None, **kwargs: Any) -> Any:
        """Compile as far as the budget goes: Inductor's kernels are written afterwards."""
        return whole(f, backend="aot_eager_decomp_partition", **kwargs)

    for budget in (1.0, 0.4, 0.0):
        torch._dynamo.reset()
        with mock.patch.object(torch, "compile", partitioned):
            f = compiling.compile_fn(perceptron, memory_budget=budget)
        got, saved[budget] = gradients_and_saved_bytes(f)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert torch._functorch.config.activation_memory_budget == 1.0  # not that of the next function
    assert saved[0.0] == 0 < saved[0.4] < saved[1.0], saved


@pytest.mark.parametrize("budget", [-0.1, 1.5])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(UserError, match="memory_budget"):
        compiling.compile_fn(perceptron, memory_budget=budget)


def test_every_shape_gets_a_graph_of_fixed_sizes() -> None:
    torch._dynamo.reset()
    shapes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.append([tuple(x.shape) for x in inputs])
        return graph.forward

    whole = torch.compile
    with mock.patch.object(torch, "compile", lambda f, options=None, **kwargs: whole(f, backend=backend, **kwargs)):
        f = compiling.compile_fn(lambda x: x.sin() + 1)
    for rows in (*range(4, 20), 5):  # more of them than torch's own limit
        f(torch.zeros(rows, 2))  # pyright: ignore[reportCallIssue]
    assert shapes == [[(rows, 2)] for rows in range(4, 20)]
    assert all(isinstance(size, int) for shape in shapes for size in shape[0])


def test_this_torch_knows_all_options_of_the_overlap() -> None:
    torch.compile(perceptron, options=compiling.overlap_options())  # it checks names and types


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="torch.compiler.nested_compile_region: wrong gradients under Inductor")
def test_regional_compilation_has_right_gradients() -> None:
    """Once it passes, layers can be compiled once and called often: a step would compile much faster."""
    torch._dynamo.reset()

    @torch.compiler.nested_compile_region
    def block(weight: Tensor, x: Tensor) -> Tensor:
        return x + torch.relu(torch.nn.functional.rms_norm(x, (WIDTH,)) @ weight).square()

    def f(weights: list[Tensor], scales: Tensor, x: Tensor) -> Tensor:
        first = x
        for scale, weight in zip(scales, weights):
            x = block(weight, scale * x + 0.1 * first)  # pyright: ignore[reportCallIssue]
        return x.square().mean()

    leaves, scales = weights(), torch.ones(LAYERS, requires_grad=True)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad(f(leaves, scales, x), [scales, *leaves])
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(leaves, scales, x), [scales, *leaves])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
