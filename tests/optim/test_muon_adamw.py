"""AdamW against torch's own, Muon against a second implementation, matrix by matrix in float64."""

import math

import pytest
import torch
from small_model import CONFIG, Unchanged, assert_trees_close, random_params
from tensordict import TensorDict
from torch import Tensor
from torch._dynamo.utils import counters

from nanochat import model, optim, tree
from nanochat.optim import muon_adamw


def row(group: str) -> model.ParamSpec:
    return model.ParamSpec((), (), lambda x, _: x, group)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hparams(group: str, **values: float) -> muon_adamw.Hparams:
    return optim.as_hparams({group: values})


def muon_hparams(**given: float) -> muon_adamw.Hparams:
    return hparams("matrix", **{"lr": 0.02, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.1} | given)


def matrices(*shapes: tuple[int, int], seed: int = 0) -> TensorDict:
    return tree.unflatten({f"m{i}": numbers(*s, seed=seed + i) for i, s in enumerate(shapes)})


def muon_state(params: TensorDict) -> muon_adamw.OptState:
    return muon_adamw.init(params, {name: row("matrix") for name in tree.flatten(params)})


# --- AdamW ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1, beta2, decay", [(0.8, 0.96, 0.01), (0.96, 0.95, 0.0), (0.8, 0.995, 0.5)])
def test_adamw_equals_that_of_torch(beta1: float, beta2: float, decay: float):
    params = tree.unflatten({"a": numbers(5, 3), "b": numbers(7, seed=1)})
    state = muon_adamw.init(params, {"a": row("g"), "b": row("g")})
    theirs = [params["a"].clone().requires_grad_(), params["b"].clone().requires_grad_()]
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(beta1, beta2), eps=1e-10, weight_decay=decay)
    for step in range(6):
        lr = 0.1 / (step + 1)
        grads = tree.unflatten({"a": numbers(5, 3, seed=10 + step), "b": numbers(7, seed=20 + step)})
        h = hparams("g", lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay)
        params, state = muon_adamw.update(grads, state, params, h)
        theirs[0].grad, theirs[1].grad = grads["a"], grads["b"]
        reference.param_groups[0]["lr"] = lr
        reference.step()
    torch.testing.assert_close(params["a"], theirs[0].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(params["b"], theirs[1].detach(), rtol=1e-5, atol=1e-6)
    assert state["step"] == 6


def test_a_table_stored_in_half_precision_is_updated_in_float32():
    exact = tree.unflatten({"a": numbers(64, 8).bfloat16().float()})
    stored = tree.unflatten({"a": exact["a"].bfloat16()})
    rows = {"a": row("g")}
    exact_state, state = muon_adamw.init(exact, rows), muon_adamw.init(stored, rows)
    assert state["g", "m", "a"].dtype == state["g", "v", "a"].dtype == torch.float32
    grads = tree.unflatten({"a": numbers(64, 8, seed=1)})
    h = hparams("g", lr=0.1, beta1=0.8, beta2=0.96, weight_decay=0.1)
    new_exact, new_exact_state = muon_adamw.update(grads, exact_state, exact, h)
    new, new_state = muon_adamw.update(grads, state, stored, h)
    assert torch.equal(new["a"], new_exact["a"].bfloat16()), "rounded once, at the end"
    assert torch.equal(new_state["g", "v", "a"], new_exact_state["g", "v", "a"])


# --- Muon -----------------------------------------------------------------------------------------------------------

SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (24, 24), "row": (1, 12), "column": (12, 1), "gate": (2, 12)}


@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("tall", "wide", "square", "gate")])
def test_orthogonalize_pushes_singular_values_to_one(shape: tuple[int, int]):
    x = numbers(3, *shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    # Spread the singular values over two orders of magnitude, more than a gradient's bulk has.
    spread = u * torch.logspace(0, -2, s.shape[-1])[:, None].mT @ v if shape[0] != shape[1] else x
    got = muon_adamw.orthogonalize(spread)
    values = torch.linalg.svdvals(got)
    assert (got.norm(dim=(-2, -1)) / min(shape) ** 0.5 - 1).abs().max() < 1e-4
    assert values.max() < 1.2 and values.mean() > 0.95
    if shape[0] != shape[1]:  # a random square matrix has singular values near zero, which take more than five steps
        assert values.min() > 0.8


def reference_muon(
    p: Tensor, g: Tensor, buf: Tensor, v: Tensor, lr: float, mu: float, beta2: float, wd: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix, one step, in float64, in the words of the rule: no stack, no broadcasting tricks."""
    r, c = p.shape
    buf = mu * buf + (1 - mu) * g
    x = (1 - mu) * g + mu * buf
    whole = x.square().sum().sqrt()
    x = torch.stack([row * (whole / math.sqrt(r)) / max(float(row.square().sum().sqrt()), 1e-6) for row in x])
    x = x / (1.01 * x.square().sum().sqrt() + 1e-6)
    for a1, b1, c1 in muon_adamw.POLAR_EXPRESS:
        if r > c:
            gram = x.T @ x
            x = a1 * x + x @ (b1 * gram + c1 * gram @ gram)
        else:
            gram = x @ x.T
            x = a1 * x + (b1 * gram + c1 * gram @ gram) @ x
    x = x * math.sqrt(min(r, c)) / max(float(x.square().sum().sqrt()), 1e-6)
    over_columns = r >= c
    s = torch.stack([line.square().mean() for line in (x if over_columns else x.T)])
    d = c if over_columns else r
    v = beta2 * v.flatten() + (1 - beta2) * s
    q = 1 / v.clamp_min(1e-10).sqrt()
    before, after = (d * s.sum()).sqrt(), (d * s * q * q).sum().sqrt()
    factor = q * before / max(float(after), 1e-10)
    u = x * (factor[:, None] if over_columns else factor[None, :])
    lr = lr * math.sqrt(max(1, r / c))
    agree = (u * p >= 0).double()
    return p - lr * u - lr * wd * p * agree, buf, v.reshape(r, 1) if over_columns else v.reshape(1, c)


@pytest.mark.parametrize("name", SHAPES)
def test_muon_equals_the_rule_matrix_by_matrix(name: str):
    shape = SHAPES[name]
    params = matrices(shape, shape, shape)
    state = muon_state(params)
    # Rows and columns of different size, so that the variance reduction has work to do.
    uneven = torch.linspace(0.2, 2, shape[0])[:, None] * torch.linspace(2, 0.2, shape[1])
    lines = shape[0] if shape[0] >= shape[1] else shape[1]
    zeros = torch.zeros(shape).double(), torch.zeros(lines).double()
    references = {n: (p.double(), *zeros) for n, p in tree.flatten(params).items()}
    for step in range(3):
        h = {"lr": 0.1 / (step + 1), "momentum": 0.85 + 0.04 * step, "beta2": 0.9, "weight_decay": 0.3}
        grads = tree.map(lambda g: g * uneven, matrices(shape, shape, shape, seed=10 * step + 5))
        params, state = muon_adamw.update(grads, state, params, optim.as_hparams({"matrix": h}))
        for n, (p, buf, v) in references.items():
            references[n] = reference_muon(
                p, grads[n].double(), buf, v, h["lr"], h["momentum"], h["beta2"], h["weight_decay"]
            )
    for n, (p, buf, v) in references.items():
        torch.testing.assert_close(params[n].double(), p, rtol=0, atol=1e-4)
        torch.testing.assert_close(state["matrix", "momentum", n].double(), buf, rtol=1e-5, atol=1e-6)
        assert state["matrix", "second", n].shape == v.shape
        torch.testing.assert_close(state["matrix", "second", n].double(), v, rtol=1e-3, atol=1e-6)


def test_a_zero_gradient_is_harmless():
    params = matrices((8, 4), (4, 8))
    zeros = tree.map(torch.zeros_like, params)
    new, state = muon_adamw.update(zeros, muon_state(params), params, muon_hparams(weight_decay=0.0))
    assert_trees_close(new, params, rtol=0)
    assert all(x.isfinite().all() for x in tree.leaves(state))


# --- the whole model ------------------------------------------------------------------------------------------------


def test_update_changes_no_argument_and_keeps_the_structure():
    params, grads = random_params(), random_params(seed=1)
    state = muon_adamw.init(params, model.spec(CONFIG))
    h = optim.as_hparams(optim.param_group_settings(optim.OptimConfig(), CONFIG.n_embd))
    assert len(tree.leaves(state)) == 1 + 2 * len(tree.leaves(params)) and not any(x.any() for x in tree.leaves(state))
    for _ in range(2):
        with Unchanged(params, grads, state, h):
            new, new_state = muon_adamw.update(grads, state, params, h)
        assert list(tree.flatten(new_state)) == list(tree.flatten(state))
        moved = [n for n, x in tree.flatten(new).items() if not torch.equal(x, tree.flatten(params)[n])]
        assert moved == list(tree.flatten(params)), "every parameter moves"
        params, state = new, new_state


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.slow
def test_compiled_rules_equal_the_plain_ones_and_do_not_compile_again_for_other_numbers(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(muon_adamw, "COMPILE_MIN_ELEMENTS", 100)
    params = tree.unflatten({"a": numbers(16, 8), "b": numbers(16, 8, seed=1), "c": numbers(3)} | {
        f"m{i}": numbers(12, 20, seed=2 + i) for i in range(3)
    })  # fmt: skip
    rows = {name: row("matrix" if name.startswith("m") else "g") for name in tree.flatten(params)}
    state = muon_adamw.init(params, rows)
    torch._dynamo.reset()
    counters.clear()
    rules = muon_adamw.compiled()
    for step in range(4):
        lr = 0.1 / (step + 1)
        h = hparams("g", lr=lr, beta1=0.8 + step / 100, beta2=0.96, weight_decay=0.1)
        h = {**h, **muon_hparams(lr=lr, momentum=0.85 + step / 100, weight_decay=0.2 - step / 20)}
        grads = tree.map(lambda p: numbers(*p.shape, seed=p.numel() + step), params)  # noqa: B023
        scale, keep = torch.tensor(0.5 + step), torch.tensor(step == 2)
        want = muon_adamw.update(grads, state, params, h, grad_scale=scale, skip=keep)
        muon_adamw.update_(grads, state, params, h, grad_scale=scale, skip=keep, rules=rules)
        for a, b in zip((params, state), want):
            assert_trees_close(a, b, rtol=1e-4)
    assert state["step"] == 3
    assert counters["stats"]["unique_graphs"] == 2, "one for AdamW's tables, one for Muon's stack"


def test_muon_dtype_is_the_precision_of_the_orthogonalization_alone():
    params, grads = matrices((32, 16)), matrices((32, 16), seed=5)
    exact, exact_state = muon_adamw.update(grads, muon_state(params), params, muon_hparams())
    half, half_state = muon_adamw.update(grads, muon_state(params), params, muon_hparams(), muon_dtype=torch.bfloat16)
    assert half["m0"].dtype == torch.float32
    assert torch.equal(half_state["matrix", "momentum", "m0"], exact_state["matrix", "momentum", "m0"])
    step, half_step = exact["m0"] - params["m0"], half["m0"] - params["m0"]
    assert 0 < (step - half_step).norm() < 0.05 * step.norm()
