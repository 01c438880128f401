"""Cross entropy of the next token: mean, per token, chunked.

A batch is {"inputs": (B, T), "targets": (B, T)} of int64 ids; targets of -1 are ignored. With "weights" (B, T) float32
the loss is the weighted sum Σ w·nll instead of the mean, as a policy gradient needs it.
Letters: B batch, T time, R rows = B·T or a chunk of them, C width, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model import gpt
from nanochat.model.gpt import LOGIT_CAP, Compute
from nanochat.model.linear import Linear, cast, dense, matmuls
from nanochat.model.params import ModelConfig, ParamsLike
from nanochat.tree import at_least_float32

Batch = Mapping[str, Tensor]
IGNORE = -1


def next_token(
    params: ParamsLike,
    batch: Batch,
    *,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (mean cross entropy in nats, {"targets": number of targets}); 0 with zero gradients for no targets.

    Args:
        config, compute: as for `model.apply`.
        chunk_tokens: compute loss and gradient in chunks of this size (see `chunked`), for training; None: in plain
            operations, for any use with `torch.func`.
    """
    config = gpt.check_inputs(params, batch["inputs"], config, compute)
    targets, weights = batch["targets"], batch.get("weights")
    num_targets = (targets != IGNORE).sum()
    x_BTC = gpt.features(params, batch["inputs"], config=config, compute=compute)
    lm_head_VC = gpt.get_param(params, "lm_head", compute)
    x_RC, targets_R = x_BTC.flatten(0, 1), targets.flatten()
    weights_R = None if weights is None else weights.flatten()
    if chunk_tokens is not None:
        value = chunked(x_RC, lm_head_VC, targets_R, config.vocab_size, chunk_tokens, compute.linear, weights_R)
    else:
        logits_RV = gpt.unembed(x_BTC, lm_head_VC, config, compute).flatten(0, 1)
        reduction = "sum" if weights_R is None else "none"
        nll = F.cross_entropy(logits_RV, targets_R, ignore_index=IGNORE, reduction=reduction)
        value = nll / num_targets.clamp_min(1) if weights_R is None else (weights_R * nll).sum()
    return value, {"targets": num_targets}


def per_token(
    params: ParamsLike,
    batch: Batch,
    *,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross entropy of each token in nats, (B, T) float32, 0 where the target is ignored."""
    config = gpt.check_inputs(params, batch["inputs"], config, compute)
    x_BTC = gpt.features(params, batch["inputs"], config=config, compute=compute)
    x_RC, targets_R = x_BTC.flatten(0, 1), batch["targets"].flatten()
    losses, lm_head_VC = [], gpt.get_param(params, "lm_head", compute)
    chunk = chunk_tokens or len(x_RC)
    for x, targets in zip(x_RC.split(chunk), targets_R.split(chunk)):
        logits = gpt.unembed(x, lm_head_VC, config, compute)
        losses.append(F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"))
    return torch.cat(losses).view_as(batch["targets"])


def chunked(
    x_RC: Tensor,
    lm_head_VC: Tensor,
    targets_R: Tensor,
    vocab_size: int,
    chunk_tokens: int,
    linear: Linear = dense,
    weights_R: Tensor | None = None,
) -> Tensor:
    """Return the mean, or weighted sum, of the cross entropy of capped logits, computed in chunks of tokens; 0-d.

    The forward pass also makes the gradient of each chunk while its logits exist: three matrix products in all, as in
    the plain form, and no (R, V) tensor.

    Args:
        x_RC: final activations. lm_head_VC: float32, with rows for the padded vocabulary.
        linear: one of nanochat.model.linear.
    """
    if torch.is_grad_enabled():
        return _chunked(x_RC, lm_head_VC, targets_R, vocab_size, chunk_tokens, linear.__name__, weights_R)
    total = at_least_float32(x_RC.new_zeros(()))
    weights_R, scale = _normalized_weights(targets_R, weights_R, total.dtype)
    for x, targets, weights in zip(*(tensor.split(chunk_tokens) for tensor in (x_RC, targets_R, weights_R))):
        total = total + _chunk_loss(linear(x, lm_head_VC), targets, weights, vocab_size)[0]
    return total * scale


def _normalized_weights(targets_R: Tensor, weights_R: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weights (R,) of at most 1, and the 0-d factor on the sum that undoes it.

    With 1/R or a caller's factor in each token's gradient, float16 would underflow or overflow.
    """
    counted_R = (targets_R != IGNORE).to(dtype)
    if weights_R is None:
        return counted_R, 1.0 / counted_R.sum().clamp_min(1)
    weights_R = weights_R.to(dtype) * counted_R
    largest = weights_R.abs().max()
    return weights_R / torch.where(largest > 0, largest, 1.0), largest


def _chunk_loss(
    z_RV: Tensor, targets_R: Tensor, weights_R: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weighted loss of a chunk of uncapped logits, and what its gradient needs: tanh, exp, its sum."""
    tanh_RV = torch.tanh(at_least_float32(z_RV) / LOGIT_CAP)
    # Capped logits lie within ±15, so exp needs no maximum subtracted first: one pass fewer.
    exp_RV = torch.exp(LOGIT_CAP * tanh_RV)
    if vocab_size < z_RV.shape[1]:
        exp_RV = torch.where(torch.arange(z_RV.shape[1], device=z_RV.device) < vocab_size, exp_RV, 0.0)
    sum_R = exp_RV.sum(-1)
    target_logit_R = LOGIT_CAP * tanh_RV.gather(-1, targets_R.clamp_min(0)[:, None])[:, 0]
    return (weights_R * (sum_R.log() - target_logit_R)).sum(), tanh_RV, exp_RV, sum_R


@torch.compiler.allow_in_graph  # see nanochat.model.linear
def _chunked(*args: Any) -> Tensor:
    return _Chunked.apply(*args)[0]  # pyright: ignore


class _Chunked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_RC: Tensor,
        lm_head_VC: Tensor,
        targets_R: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        linear: str,
        weights_R: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = x_RC.dtype
        total = at_least_float32(x_RC.new_zeros(()))
        weights_R, scale = _normalized_weights(targets_R, weights_R, total.dtype)
        grad_weight = torch.zeros(lm_head_VC.shape, dtype=total.dtype, device=x_RC.device)
        grad_x = []
        columns = torch.arange(lm_head_VC.shape[0], device=x_RC.device)
        # Every chunk, the last one too, has a multiple of these rows.
        products = matmuls(linear, math.gcd(len(x_RC), min(chunk_tokens, len(x_RC))), lm_head_VC)
        weight = products.operand(lm_head_VC, dtype)
        for x_chunk, targets, weights in zip(*(tensor.split(chunk_tokens) for tensor in (x_RC, targets_R, weights_R))):
            x = products.operand(x_chunk, dtype)
            loss, tanh_RV, exp_RV, sum_R = _chunk_loss(products.y(x, weight, dtype), targets, weights, vocab_size)
            total = total + loss
            # d loss / d z through 15·tanh(z / 15) is (softmax - onehot)·(1 - tanh²): the factors 15 and 1/15 cancel.
            softmax_RV = exp_RV * (weights / sum_R)[:, None]
            onehot_RV = torch.where(columns == targets[:, None], weights[:, None], 0.0)
            grad_z_RV = ((softmax_RV - onehot_RV) * (1 - tanh_RV * tanh_RV)).to(dtype)
            grad_z = products.grad_operand(grad_z_RV, dtype)
            grad_x.append(products.grad_x(grad_z, weight, dtype))
            grad_weight = grad_weight + products.grad_w(grad_z, x, total.dtype)
        return total * scale, torch.cat(grad_x), cast(grad_weight, lm_head_VC.dtype), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, grad_x, grad_weight, scale = output
        ctx.mark_non_differentiable(grad_x, grad_weight, scale)
        ctx.save_for_backward(grad_x, grad_weight, scale)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, scale = ctx.saved_tensors
        factor = grad_loss * scale
        grad_x = (factor * at_least_float32(grad_x)).to(grad_x.dtype)
        return grad_x, factor * grad_weight, None, None, None, None, None
