"""`value_and_grad` keeps the contract of torch.func.grad_and_value, and works where that does not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from small_model import Unchanged
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from nanochat import transform, tree


class Pair(NamedTuple):
    left: Tensor
    right: dict[str, Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nest() -> Any:
    """Return a tree of every kind of node, with a leaf that the functions below do not use."""
    table = TensorDict({"w": numbers(3, 2), "deep": {"b": numbers(2, seed=1)}}, batch_size=[])
    return {"pair": Pair(numbers(4), {"x": numbers(3, seed=2)}), "table": table, "list": [numbers(2, seed=3)]}


def of_nest(params: Any, factor: Tensor) -> Tensor:
    pair, table = params["pair"], params["table"]
    return factor * (pair.right["x"] @ table["w"] * table["deep", "b"].sin()).sum() + pair.left.pow(3).sum()


def with_aux(params: Any, factor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    value = of_nest(params, factor)
    return value, {"twice": 2 * value, "parts": (params["pair"].left, [factor + 1])}


def assert_same(got: Any, want: Any) -> None:
    got_leaves, got_form = pytree.tree_flatten(got)
    want_leaves, want_form = pytree.tree_flatten(want)
    assert str(got_form) == str(want_form)
    for a, b in zip(got_leaves, want_leaves):
        torch.testing.assert_close(a, b)


def constant(params: Any, factor: Tensor) -> Tensor:
    return 2 * factor


@pytest.mark.parametrize("f, has_aux", [(of_nest, False), (with_aux, True), (constant, False)])
def test_equals_torch_func_on_nested_trees(f: Callable[..., Any], has_aux: bool):
    got = transform.value_and_grad(f, has_aux=has_aux)(nest(), torch.tensor(2.0))
    want = torch.func.grad_and_value(f, has_aux=has_aux)(nest(), torch.tensor(2.0))
    assert_same(got, want)
    assert isinstance(got[0]["pair"], Pair) and isinstance(got[0]["table"], TensorDict)
    assert torch.equal(got[0]["list"][0], torch.zeros(2)), "an unused leaf has a zero gradient"
    assert not any(x.requires_grad for x in tree.leaves(got) if isinstance(x, Tensor))


def test_arguments_and_grad_mode_are_unchanged():
    params = {"free": numbers(3), "leaf": numbers(3, seed=1).requires_grad_(), "derived": None}
    params["derived"] = params["leaf"] * 2  # part of the caller's own graph
    params["leaf"].grad = torch.ones(3)
    f = lambda p: (p["free"] * p["leaf"] * p["derived"]).sum()  # noqa: E731
    run = transform.value_and_grad(f)
    with Unchanged(params["free"], params["leaf"]):
        first = run(params)
        with torch.no_grad():
            second = run(params)
    assert_same(first, second)
    assert not first[1].requires_grad
    torch.testing.assert_close(first[0]["leaf"], params["free"] * params["derived"].detach())


def test_non_scalar_value_is_refused():
    with pytest.raises(ValueError, match=r"the function returned shape \(1,\), expected a 0-d tensor"):
        transform.value_and_grad(lambda p: p.sum()[None])(numbers(3))


# --- where torch.func does not go -----------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    """2x with a declared gradient of 5: whoever answers 2 has not called this backward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 5 * grad


def doubled(x: Tensor) -> Tensor:
    out = Double.apply(x)
    assert isinstance(out, Tensor)
    return out.sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_custom_backward_is_used(compiled: bool):
    f = torch.compile(doubled, fullgraph=True, backend="aot_eager") if compiled else doubled
    grads, value = transform.value_and_grad(f)(torch.ones(3))
    assert value == 6 and grads.tolist() == [5, 5, 5]


def test_compiled_torch_func_grad_uses_only_a_backward_that_dynamo_does_not_look_into():
    """Hence `allow_in_graph` around every custom backward of the model. The day the first assert fails, it may go."""
    wrapped: Any = torch.compiler.allow_in_graph(lambda x: Double.apply(x))
    for f, expected in ((doubled, 2), (lambda x: wrapped(x).sum(), 5)):
        compiled: Any = torch.compile(torch.func.grad(f), fullgraph=True, backend="eager")
        assert compiled(torch.ones(3)).tolist() == [expected] * 3
