"""Derivatives through training."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import optim
from nanochat.optim import Hparams, OptState
from nanochat.train.step import Batch


def unroll(
    params: TensorDict,
    opt_state: OptState,
    batches: Iterable[Batch],
    hparams: Iterable[Hparams],
    *,
    loss_fn: Callable[..., tuple[Tensor, Any]],
) -> tuple[TensorDict, OptState]:
    """Return parameters and optimizer state after one step on each batch, as a function that can be differentiated.

    With `torch.func.grad` of a validation loss after it, hyperparameters and the "weights" of batches get gradients
    through all steps. Memory grows by the activations of each step, and no kernel of attention but `math` has the
    second derivatives; the loss has to be the plain one (no chunk_tokens).

    Args:
        loss_fn: (params, batch) -> (0-d loss, aux).
    """
    gradient = torch.func.grad(loss_fn, has_aux=True)
    for batch, h in zip(batches, hparams, strict=True):
        grads, _ = gradient(params, batch)
        params, opt_state = optim.update(grads, opt_state, params, h)
    return params, opt_state
