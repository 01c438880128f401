"""Many models in one step.

The state of N members is one `TrainState` whose leaves have a leading axis of N. Loss and update rules are those of one
model under `torch.func.vmap`, and hyperparameters are (N,) tensors. Members do not see each other: each has the numbers
of its own run, up to the order of float32 sums. A member whose loss or gradient is not finite is frozen: its loss scale
becomes NaN, which skips all its later steps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import optim, transform, tree
from nanochat.model import Attend
from nanochat.optim import Hparams
from nanochat.optim.muon_adamw import Rules, adamw, compiled_if_large, muon
from nanochat.train import step
from nanochat.train.step import Batch, Metrics, TrainState, TrainStep


def stack(states: Sequence[Any]) -> Any:
    """Return trees of one structure as one tree with a leading axis."""
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


def select(states: Any, index: int) -> Any:
    """Return the tree of one member, as views."""
    return tree.map(lambda x: x[index], states)


def frozen(state: TrainState) -> Tensor:
    """Return which members have diverged, (N,) bool."""
    return state.scaler["scale"].isnan()


def make_members_step(
    loss_fn: Callable[..., tuple[Tensor, Any]],
    *,
    shared_batch: bool,
    compute_dtype: torch.dtype = torch.float32,
    compile: Callable[[Any], Any] | None = None,
) -> TrainStep:
    """Return (state, micro-batches, hparams) -> (state, {"loss", "grad_norm": (N,) float32, "finite": (N,) bool}).

    The state is updated in place. Hyperparameters are (N,).

    Args:
        loss_fn: (params, batch) -> (0-d loss, aux) of one member, with `fold_members` around its attention.
        shared_batch: all members see the same batch (B, T); otherwise a batch has a leading axis, (N, B, T).
        compute_dtype: see `make_update`; not float16, whose loss scale changes.
        compile: `distributed.compile_fn` with its settings bound, or None.
    """
    compile_rule = compiled_if_large if compile else (lambda rule: rule)
    muon_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else None
    rules = Rules(compile_rule(adamw_members), compile_rule(muon_members))

    def loss_one(params: TensorDict, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor]:
        loss, _ = loss_fn(params, batch)
        return loss * scale, loss

    def total(params: TensorDict, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor]:
        # The sum's gradient with respect to a member's parameters is that member's own.
        scaled, losses = torch.func.vmap(loss_one, in_dims=(0, None if shared_batch else 0, 0))(params, batch, scale)
        return scaled.sum(), losses

    @torch.no_grad()
    def update_(
        state: TrainState, grads: TensorDict, grad_scale: Tensor, losses: Tensor, hparams: Hparams
    ) -> tuple[TrainState, Metrics]:
        norms = torch.func.vmap(lambda g: torch.nn.utils.get_total_norm(tree.leaves(g), foreach=False))(grads)
        norms = norms * grad_scale
        finite = torch.isfinite(losses) & torch.isfinite(norms)
        options: Any = {"grad_scale": grad_scale, "skip": ~finite, "muon_dtype": muon_dtype}
        optim.update_(grads, state.opt_state, state.params, hparams, rules=rules, **options)
        state.step.add_(1)
        state.scaler["scale"].masked_fill_(~finite, torch.nan)
        return state, {"loss": losses, "grad_norm": norms, "finite": finite}

    value_and_grad = transform.value_and_grad(compile(total) if compile else total, has_aux=True)

    def members_step(state: TrainState, batches: Sequence[Batch], hparams: Hparams) -> tuple[TrainState, Metrics]:
        return step.train_step(state, batches, hparams, value_and_grad=value_and_grad, update=update_)

    return members_step


def adamw_members(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `optim.adamw` of parameters with a leading axis of members, and (N,) hyperparameters."""
    rule: Any = torch.func.vmap(adamw)
    return rule(*args)


def muon_members(
    p: Tensor, g: Tensor, momentum: Tensor, second_moment: Tensor, h: Any, grad_scale: Tensor, skip: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `optim.muon` of stacks (n, N, r, c) of the matrices of all members, and (N,) hyperparameters."""
    dtype, _ = rest  # no exchange between ranks: each has whole members
    rule = torch.func.vmap(functools.partial(muon, dtype=dtype), in_dims=(1, 1, 1, 1, 0, 0, 0), out_dims=1)
    return rule(p, g, momentum, second_moment, h, grad_scale, skip)


def fold_members(attend: Attend) -> Attend:
    """Return `attend` with a rule for vmap: the members become rows of the batch, one kernel call for all."""

    class Folded(torch.autograd.Function):
        @staticmethod
        def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            return attend(q, k, v, window)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            pass

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:  # pyright: ignore
            *tensors, window = args
            rows = [
                x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in zip(tensors, in_dims)
            ]
            q, k, v = (x.flatten(0, 1) for x in rows)
            return attend(q, k, v, window).unflatten(0, (info.batch_size, -1)), 0

    @torch.compiler.allow_in_graph
    def call(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return Folded.apply(q, k, v, window)  # pyright: ignore

    return call


def stack_hparams(members: Sequence[Hparams]) -> dict[str, dict[str, Tensor]]:
    """Return the hyperparameters of all members as (N,) tensors."""
    return {g: {name: torch.stack([h[g][name] for h in members]) for name in row} for g, row in members[0].items()}
