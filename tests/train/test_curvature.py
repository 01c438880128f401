"""Hessian products, eigenvalues, trace and preconditioner against full matrices."""

import functools
from typing import Any

import pytest
import torch
from small_model import random_batch, random_params
from torch import Tensor

from nanochat import model, optim, train, tree
from nanochat.config import UserError
from nanochat.model import Compute, ModelConfig, attention, loss
from nanochat.optim.muon_adamw import orthogonalize
from nanochat.train import functional

CONFIG = ModelConfig(sequence_len=8, vocab_size=20, n_layer=1, n_head=2, n_kv_head=1, n_embd=24)
LEAVES = ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.value_gate", "smear_gate", "resid_lambdas")


@functools.cache
def problem() -> tuple[Tensor, Any, Tensor]:
    """Some parameters of a model as a vector (float64), its loss as their function, and the full Hessian."""
    params = tree.flatten(tree.map(lambda x: x.double(), random_params(CONFIG)))
    compute, batch = Compute(attend=attention.math), random_batch(CONFIG)
    x, unravel = functional.ravel({name: params[name] for name in LEAVES})

    def flat_loss(vector: Tensor) -> Tensor:
        whole = tree.nest(params | unravel(vector))
        return loss.next_token(whole, batch, config=CONFIG, compute=compute)[0]

    hessian = torch.func.jacrev(torch.func.grad(flat_loss), chunk_size=128)(x)
    return x, flat_loss, hessian


def random_vector(like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def test_products_eigenvalues_and_trace_are_those_of_the_full_hessian():
    x, flat_loss, hessian = problem()
    product = functional.hvp(flat_loss, x)
    v = random_vector(x)
    torch.testing.assert_close(product(v), hessian @ v, rtol=0, atol=1e-10)
    values, vectors = torch.linalg.eigh(hessian)
    top = functional.lanczos(product, v, 5, 120, tolerance=1e-8)
    torch.testing.assert_close(top.values, values.flip(0)[:5], rtol=0, atol=1e-6)
    assert top.products < 120 and top.smallest == pytest.approx(float(values[0]), abs=1e-6)
    alike = (top.vectors @ vectors.flip(1)[:, :5]).abs()
    torch.testing.assert_close(alike, torch.eye(5, dtype=x.dtype), rtol=0, atol=1e-4)
    few = functional.lanczos(product, v, 5, 12)
    assert few.products == 12 and all(
        (value - values).abs().min() <= error for value, error in zip(few.values, few.errors)
    )
    trace, generator = float(hessian.trace()), torch.Generator().manual_seed(0)
    plain = functional.hutchinson(hessian.mv, x, 40, generator)
    deflated = functional.hutchinson(hessian.mv, x, 40, generator, top.vectors)
    for estimate, error in (plain, deflated):
        assert 0 < abs(estimate - trace) < 2 * error
    assert deflated[1] < plain[1]


def test_repeated_eigenvalues_are_all_found():
    diagonal = torch.tensor([3.0, 3, 3, 1, 0, 0, -5], dtype=torch.float64)
    top = functional.lanczos(lambda v: diagonal * v, random_vector(diagonal), 5, 7)
    torch.testing.assert_close(top.values, diagonal[:5], rtol=0, atol=1e-12)
    assert top.smallest == pytest.approx(-5)


def test_product_that_is_not_finite_is_an_error():
    with pytest.raises(UserError, match="product 1 with the Hessian is not finite"):
        functional.lanczos(lambda v: v * torch.nan, torch.ones(3), 1, 3)


def test_preconditioner_is_what_the_optimizer_multiplies_its_momentum_by():
    params, spec = random_params(CONFIG), model.spec(CONFIG)
    hparams = optim.as_hparams(optim.param_group_settings(optim.OptimConfig(weight_decay=0.0), CONFIG.n_embd))
    no_decay = {group: {**h, "weight_decay": torch.tensor(0.0)} for group, h in hparams.items()}
    state = train.init(params, spec)
    opt_state = state.opt_state
    for seed in range(3):
        grads = random_params(CONFIG, seed + 5)
        grads["wte"][7] = 0.0  # no token has used this row
        old, (params, opt_state) = params, optim.update(grads, opt_state, params, no_decay)
    root = functional.inverse_root(opt_state, no_decay)
    step = tree.flatten(tree.map(lambda new, before: before - new, params, old))
    group_of = {name: row.group for name, row in spec.items()}
    momentum = {
        name: opt_state[group, "momentum" if group == "matrix" else "m"][tuple(name.split("."))]
        for name, group in group_of.items()
    }
    scaled = tree.flatten(root(root(tree.unflatten(momentum, params))))
    for name, group in group_of.items():
        if group == "matrix":  # up to the approximation of Polar Express and the scale of rows
            h = no_decay["matrix"]["lr"] * max(1.0, momentum[name].shape[0] / momentum[name].shape[1]) ** 0.5
            polar = torch.linalg.svd(momentum[name], full_matrices=False)
            torch.testing.assert_close(scaled[name], h * polar.U @ polar.Vh, rtol=0, atol=1e-4)
            alike = torch.nn.functional.cosine_similarity(
                scaled[name].flatten(), orthogonalize(momentum[name][None]).flatten(), 0
            )
            assert alike > 0.97, name
        else:
            beta1 = float(no_decay[group]["beta1"])
            torch.testing.assert_close(scaled[name] / (1 - beta1**3), step[name], rtol=1e-2, atol=1e-6)
    assert not scaled["wte"][7].any()
