"""Many models in one step.

The state of N members is one `TrainState` whose leaves have a leading axis of N. Loss and update rules are those of one
model under `torch.func.vmap`, and hyperparameters are (N,) tensors. Members do not see each other: each has the numbers
of its own run, up to the order of float32 sums. A member whose loss or gradient is not finite is frozen: its loss scale
becomes NaN, which skips all its later steps.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import optim, transform, tree
from nanochat.model import Attend, ModelConfig
from nanochat.optim import Hparams
from nanochat.optim.muon_adamw import Rules, adamw, adamw_, compiled_if_large, muon
from nanochat.train import step
from nanochat.train.step import Batch, Metrics, TrainState, TrainStep

CPU_VMAP_PRODUCT = 2**23  # multiplications of a width by width product of all tokens of a micro-batch


def stack(states: Sequence[Any]) -> Any:
    """Return trees of one structure as one tree with a leading axis."""
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


def init_members(init: Callable[[int], Any], count: int) -> Any:
    """Return `stack` of init(0) … init(count - 1), with no more than one of them in memory beside it."""
    first = init(0)
    states = tree.map(lambda x: x.new_empty((count, *x.shape)), first)
    for index in range(count):
        member = init(index) if index else first
        tree.map(lambda whole, x: whole[index].copy_(x), states, member)  # noqa: B023 (called at once)
    return states


def select(states: Any, index: int | slice) -> Any:
    """Return the tree of one member or a few, as views."""
    return tree.map(lambda x: x[index], states)


def frozen(state: TrainState) -> Tensor:
    """Return which members have diverged, (N,) bool."""
    return state.scaler["scale"].isnan()


def make_members_step(
    loss_fn: Callable[..., tuple[Tensor, Any]],
    *,
    shared_batch: bool,
    chunk_size: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    compile: Callable[[Any], Any] | None = None,
) -> TrainStep:
    """Return (state, micro-batches, hparams) -> (state, {"loss", "grad_norm": (N,) float32, "finite": (N,) bool}).

    The state is updated in place. Hyperparameters are (N,).

    Args:
        loss_fn: (params, batch) -> (0-d loss, aux) of one member, with `fold_members` around its attention unless
            `chunk_size` is 1, where nothing is mapped.
        shared_batch: all members see the same batch (B, T); otherwise a batch has a leading axis, (N, B, T).
        chunk_size: members computed at once, as in `torch.func.vmap`; None: all. Fewer take less memory for activations
            and gradients, and are faster where a single model keeps the machine busy: 1 is a step a member.
        compute_dtype: see `make_update`; not float16, whose loss scale changes.
        compile: `distributed.compile_fn` with its settings bound, or None.
    """
    compile_rule = compiled_if_large if compile else (lambda rule: rule)
    muon_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else None
    single = chunk_size == 1
    rules = Rules(*map(compile_rule, (adamw_, muon) if single else (adamw_members, muon_members)))

    def loss_one(params: TensorDict, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor]:
        loss, _ = loss_fn(params, batch)
        return loss * scale, loss

    def total(params: TensorDict, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor]:
        # The sum's gradient with respect to a member's parameters is that member's own.
        scaled, losses = torch.func.vmap(loss_one, in_dims=(0, None if shared_batch else 0, 0))(params, batch, scale)
        return scaled.sum(), losses

    def norm(grads: TensorDict) -> Tensor:
        return torch.nn.utils.get_total_norm(tree.leaves(grads), foreach=False)

    @torch.no_grad()
    def update_(
        state: TrainState, grads: TensorDict, grad_scale: Tensor, loss: Tensor, hparams: Hparams
    ) -> tuple[TrainState, Metrics]:
        grad_norm = (norm if single else torch.func.vmap(norm))(grads) * grad_scale
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        options: Any = {"grad_scale": grad_scale, "skip": ~finite, "muon_dtype": muon_dtype}
        optim.update_(grads, state.opt_state, state.params, hparams, rules=rules, **options)
        state.scaler["scale"].masked_fill_(~finite, torch.nan)
        return state, {"loss": loss, "grad_norm": grad_norm, "finite": finite}

    loss = loss_one if single else total
    value_and_grad = transform.value_and_grad(compile(loss) if compile else loss, has_aux=True)

    def members_step(state: TrainState, batches: Sequence[Batch], hparams: Hparams) -> tuple[TrainState, Metrics]:
        parts = []
        for at in chunks(len(state.scaler["scale"]), chunk_size):
            own = TrainState(state.step, *(select(part, at) for part in state[1:]))  # views: updated in place
            seen = batches if shared_batch else [select(batch, at) for batch in batches]
            functions: Any = {"value_and_grad": value_and_grad, "update": update_}
            parts.append(step.train_step(own, seen, select(hparams, at), **functions)[1])
        state.step.add_(1)
        return state, {
            name: (torch.stack if single else torch.cat)([part[name] for part in parts]) for name in parts[0]
        }

    return members_step


def choose_chunk_size(shape: ModelConfig, tokens: int, count: int, device: torch.device) -> int:
    """Return how many of `count` members to compute at once, with so many tokens a micro-batch of each.

    By a rule, not by a trial: a choice that depends on the moment would change the last bits of the numbers. On the
    CPU, at most half of the members, so that two ranks compute in the same chunks as one and have the same bits.
    """
    if device.type != "cpu":
        return count
    # A CPU gains by fewer calls where a matrix product is small, and loses by leaving the cache where it is large.
    return 1 if tokens * shape.n_embd**2 > CPU_VMAP_PRODUCT else min(max(count // 2, 1), 4)


def chunks(count: int, chunk_size: int | None) -> Iterator[int | slice]:
    """Yield an index of each chunk of members: of a chunk of one, the member's own."""
    size = chunk_size or count
    for start in range(0, count, size):
        yield start if size == 1 else slice(start, start + size)


def make_members_loss(
    loss_fn: Callable[..., Any], *, chunk_size: int | None = None, compile: Callable[[Any], Any] | None = None
) -> Callable[[TensorDict, Batch], Any]:
    """Return (params of N members, batch) -> what `loss_fn` returns of each, stacked; for evaluation.

    Args: as for `make_members_step`; the batch is shared.
    """
    of_chunk = loss_fn if chunk_size == 1 else torch.func.vmap(loss_fn, in_dims=(0, None))
    of_chunk = compile(of_chunk) if compile else of_chunk
    join = torch.stack if chunk_size == 1 else torch.cat

    def losses(params: TensorDict, batch: Batch) -> Any:
        count = len(tree.leaves(params)[0])
        parts = [of_chunk(select(params, at), batch) for at in chunks(count, chunk_size)]
        return tree.map(lambda *xs: join(xs), *parts)

    return losses


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


def stack_hparams(members: Sequence[Hparams], device: torch.device | str = "cpu") -> dict[str, dict[str, Tensor]]:
    """Return the hyperparameters of all members as (N,) tensors."""
    names = [(group, name) for group, row in members[0].items() for name in row]
    values = torch.stack([torch.stack([h[group][name] for h in members]) for group, name in names]).to(device)
    stacked: dict[str, dict[str, Tensor]] = {group: {} for group in members[0]}
    for (group, name), x in zip(names, values):
        stacked[group][name] = x
    return stacked
