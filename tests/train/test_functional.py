"""Many models in one step, and derivatives through training."""

import functools
from typing import Any

import pytest
import torch
from small_model import CONFIG, assert_trees_close, random_batch, random_params
from torch import Tensor

from nanochat import model, optim, train, tree
from nanochat.model import Compute, attention, loss
from nanochat.train import TrainState, functional

LRS = (0.005, 0.02, 0.08)


def hparams(matrix_lr: float) -> optim.Hparams:
    config = optim.OptimConfig(matrix_lr=matrix_lr)
    return optim.as_hparams(optim.param_group_settings(config, CONFIG.n_embd, batch_scale=0.1))


def loss_of(attend: Any) -> Any:
    compute = Compute(torch.float32, attend=attend)
    return functools.partial(loss.next_token, config=CONFIG, compute=compute, chunk_tokens=16)


def states() -> list[TrainState]:
    return [train.init(random_params(seed=seed), model.spec(CONFIG)) for seed in range(len(LRS))]


def run(
    step: Any, state: TrainState, hparams: optim.Hparams, shared: bool = True, steps: int = 5
) -> tuple[TrainState, Tensor]:
    """Return the state after a few steps of two micro-batches, and the loss of each step."""
    losses = []
    for number in range(steps):
        batches = [random_batch(seed=2 * number + part) for part in range(2)]
        if not shared:
            batches = [functional.stack([batch, batch, batch]) for batch in batches]
        state, metrics = step(state, batches, hparams)
        losses.append(metrics["loss"])
    return state, torch.stack(losses)


@pytest.mark.parametrize("compile, shared", [(False, True), (False, False), (True, True)])
def test_members_equal_their_own_runs(compile: bool, shared: bool):
    compile_fn: Any = functools.partial(torch.compile, fullgraph=True, backend="aot_eager") if compile else None
    together = functional.make_members_step(
        loss_of(functional.fold_members(attention.sdpa)), shared_batch=shared, compile=compile_fn
    )
    stacked = functional.stack_hparams([hparams(lr) for lr in LRS])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # one compilation for all members and steps
        state, losses = run(together, functional.stack(states()), stacked, shared)
    assert not functional.frozen(state).any()
    value_and_grad = train.gradient(loss_of(attention.sdpa))
    alone = functools.partial(train.train_step, value_and_grad=value_and_grad, update=train.make_update())
    for index, (start, lr) in enumerate(zip(states(), LRS)):
        own, own_losses = run(alone, start, hparams(lr))
        torch.testing.assert_close(losses[:, index], own_losses, rtol=0, atol=1e-5)
        assert_trees_close(functional.select(state, index).params, own.params, rtol=1e-2)
        assert_trees_close(functional.select(state, index).opt_state, own.opt_state, rtol=1e-2)


def test_member_that_diverges_is_frozen_and_the_others_do_not_notice():
    step = functional.make_members_step(loss_of(functional.fold_members(attention.sdpa)), shared_batch=True)
    wild = functional.stack_hparams([hparams(lr) for lr in (0.005, 1e30, 0.08)])
    state, losses = run(step, functional.stack(states()), wild)
    assert functional.frozen(state).tolist() == [False, True, False]
    kept = functional.select(state, 1)
    assert all(x.isfinite().all() for x in tree.leaves(kept.params)), "the last finite parameters are kept"
    again, _ = run(step, tree.map(torch.clone, state), wild)
    assert_trees_close(functional.select(again, 1).params, kept.params, rtol=0)
    calm = functional.stack_hparams([hparams(lr) for lr in LRS])
    others, calm_losses = run(step, functional.stack(states()), calm)
    for index in (0, 2):
        assert torch.equal(losses[:, index], calm_losses[:, index])
        assert_trees_close(functional.select(state.params, index), functional.select(others.params, index), rtol=0)


def test_derivatives_through_training_equal_finite_differences():
    """Of five steps of AdamW and Muon. The first steps of AdamW are signs of gradients: they come before."""
    compute, start, rates = Compute(torch.float32, attend=attention.math), random_params(), hparams(0.005)
    loss_fn = functools.partial(loss.next_token, config=CONFIG, compute=compute)
    batches = [random_batch(rows=8, seed=seed) for seed in range(26)]
    opt_state = optim.init(start, model.spec(CONFIG))
    params, opt_state = functional.unroll(start, opt_state, batches[:20], [rates] * 20, loss_fn=loss_fn)
    share = (batches[0]["targets"] != -1) / 125.0

    def validation(factor: Tensor, weight: Tensor) -> Tensor:
        scaled = {group: {**h, "lr": h["lr"] * factor} for group, h in rates.items()}
        weighted = [{**batch, "weights": share} for batch in batches[20:25]]
        weighted[0]["weights"] = weight * share
        trained, _ = functional.unroll(params, opt_state, weighted, [scaled] * 5, loss_fn=loss_fn)
        return loss_fn(trained, batches[25])[0]

    at = [torch.tensor(1.0), torch.tensor(1.0)]
    slopes = torch.func.grad(validation, argnums=(0, 1))(*at)
    for index, slope in enumerate(slopes):
        values = [validation(*(x + sign * 0.01 * (i == index) for i, x in enumerate(at))) for sign in (1, -1)]
        assert float(slope) == pytest.approx(float(values[0] - values[1]) / 0.02, rel=0.03), index


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_torch_func_uses_the_backward_of_an_external_kernel(backend: str | None):
    class Kernel(torch.autograd.Function):  # as flash_attn has it; its backward is told apart by the factors
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(k, v)
            return q.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
            k, v = ctx.saved_tensors
            return 5 * grad, 6 * grad * k, 7 * grad * v

    def kernel(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return Kernel.apply(q, k, v)  # pyright: ignore

    attend = functional.with_visible_backward(kernel)
    q, k, v = (torch.randn(2, 16, 2, 4) for _ in range(3))
    of_func: Any = torch.func.grad(lambda q, k, v: attend(q, k, v, 8).sum(), argnums=(0, 1, 2))
    of_func = torch.compile(of_func, fullgraph=True, backend=backend) if backend else of_func
    got = of_func(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(got, (5 * torch.ones_like(q), 6 * k, 7 * v)))
