"""Cross entropy of the next token: mean, per token, and a chunked form that never holds all logits.

A batch is {"inputs": (B, T), "targets": (B, T)} of int64 ids; targets of -1 do not count.
Letters: B batch, T time, R rows = B·T or a chunk of them, C width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import model
from nanochat.model import LOGIT_CAP, Compute, ModelConfig, Params

Batch = Mapping[str, Tensor]
IGNORE = -1


def next_token(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig = ModelConfig(),
    compute: Compute = Compute(),
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (mean cross entropy in nats, aux) over the targets that count; zero, with zero gradients, for none.

    Args:
        params: as from `model.init`. batch: inputs and targets.
        config, compute: as for `model.apply`.
        chunk_tokens: None differentiates plain operations, for any use with `torch.func`; a number computes loss and
            gradient in chunks of so many tokens, by a custom backward (`chunked_mean`): for training.

    Returns:
        0-d float32 loss, and {"targets": 0-d int64 number of targets that count}.
    """
    targets = batch["targets"]
    counted = (targets != IGNORE).sum()
    x_BTC = model.features(params, batch["inputs"], config=config, compute=compute)
    lm_head_VC = model.gathered(params, "lm_head", compute)
    if chunk_tokens is None:
        logits_BTV = model.unembed(x_BTC, lm_head_VC, config, compute)
        nll = F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return nll / counted.clamp_min(1), {"targets": counted}
    mean = chunked_mean(x_BTC.flatten(0, 1), lm_head_VC, targets.flatten(), config.vocab_size, chunk_tokens)
    return mean, {"targets": counted}


def per_token(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig = ModelConfig(),
    compute: Compute = Compute(),
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross entropy of every token, (B, T) float32 nats, 0 where the target is -1. Arguments as above."""
    x_BTC = model.features(params, batch["inputs"], config=config, compute=compute)
    x_RC, targets_R = x_BTC.flatten(0, 1), batch["targets"].flatten()
    losses, lm_head_VC = [], model.gathered(params, "lm_head", compute)
    for x, targets in zip(x_RC.split(chunk_tokens or len(x_RC)), targets_R.split(chunk_tokens or len(x_RC))):
        logits = model.unembed(x, lm_head_VC, config, compute)
        losses.append(F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"))
    return torch.cat(losses).view_as(batch["targets"])


def chunked_mean(x_RC: Tensor, lm_head_VC: Tensor, targets_R: Tensor, vocab_size: int, chunk_tokens: int) -> Tensor:
    """Return the mean cross entropy of capped logits, computed with its gradient a chunk of tokens at a time.

    The gradient with respect to `x` and `lm_head` is made in the forward pass, while a chunk's logits are at hand,
    and only scaled in the backward: three matrix products in all, as in the plain form, and no (R, V) tensor. It is
    a custom backward, so it works under torch.autograd.grad and not under compiled torch.func.grad.

    Args:
        x_RC: (R, C) final activations. lm_head_VC: (V', C) float32, V' >= vocab_size. targets_R: (R,) int64.
        vocab_size: logits that take part. chunk_tokens: rows of a chunk.

    Returns:
        0-d float32.
    """
    if not torch.is_grad_enabled():
        total = x_RC.new_zeros((), dtype=torch.float32)
        for x, targets in zip(x_RC.split(chunk_tokens), targets_R.split(chunk_tokens)):
            total = total + _chunk(x, lm_head_VC[:vocab_size].to(x.dtype), targets)[0]
        return total / (targets_R != IGNORE).sum().clamp_min(1)
    return _ChunkedMean.apply(x_RC, lm_head_VC, targets_R, vocab_size, chunk_tokens)[0]  # pyright: ignore


def _chunk(x_RC: Tensor, weight_VC: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the summed loss of a chunk and what its gradient needs: tanh, exponentials, their sum, who counts."""
    tanh_RV = torch.tanh((x_RC @ weight_VC.T).float() / LOGIT_CAP)
    counted_R = targets_R != IGNORE
    # Capped logits lie within ±15, so their exponentials need no maximum taken out first: one pass fewer.
    exp_RV = torch.exp(LOGIT_CAP * tanh_RV)
    sum_R = exp_RV.sum(-1)
    chosen_R = LOGIT_CAP * tanh_RV.gather(-1, targets_R.clamp_min(0)[:, None])[:, 0]
    loss = torch.where(counted_R, sum_R.log() - chosen_R, 0.0).sum()
    return loss, tanh_RV, exp_RV, sum_R, counted_R


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        x_RC: Tensor, lm_head_VC: Tensor, targets_R: Tensor, vocab_size: int, chunk_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight_VC = lm_head_VC[:vocab_size].to(x_RC.dtype)
        scale = 1.0 / (targets_R != IGNORE).sum().clamp_min(1).float()
        total = x_RC.new_zeros((), dtype=torch.float32)
        grad_weight = torch.zeros(weight_VC.shape, dtype=torch.float32, device=x_RC.device)
        grad_x = []
        columns = torch.arange(vocab_size, device=x_RC.device)
        for x, targets in zip(x_RC.split(chunk_tokens), targets_R.split(chunk_tokens)):
            loss, tanh_RV, exp_RV, sum_R, counted_R = _chunk(x, weight_VC, targets)
            total = total + loss
            # d loss / d z of z -> 15·tanh(z / 15): (softmax - one-hot)·(1 - tanh²); the chain of 15 and 1/15 cancels.
            # Neither the mean's 1/R nor the caller's factor is in it: in float16 they would underflow and overflow.
            row_R = counted_R[:, None].float()
            softmax_RV = exp_RV * (row_R / sum_R[:, None])
            onehot_RV = torch.where(columns == targets[:, None], row_R, 0.0)
            grad_z = ((softmax_RV - onehot_RV) * (1 - tanh_RV * tanh_RV)).to(x.dtype)
            grad_x.append(grad_z @ weight_VC)
            grad_weight = grad_weight + (grad_z.T @ x).float()
        pad = lm_head_VC.shape[0] - vocab_size
        grad_weight = F.pad(grad_weight, (0, 0, 0, pad)) if pad else grad_weight
        return total * scale, torch.cat(grad_x), grad_weight.to(lm_head_VC.dtype), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, grad_x, grad_weight, scale = output
        ctx.mark_non_differentiable(grad_x, grad_weight, scale)
        ctx.save_for_backward(grad_x, grad_weight, scale)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, scale = ctx.saved_tensors
        factor = grad_loss * scale
        return (factor * grad_x.float()).to(grad_x.dtype), factor * grad_weight, None, None, None
