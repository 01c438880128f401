"""Cross entropy of the next token: mean, per token, and a chunked form that never holds all logits.

A batch is {"inputs": (B, T), "targets": (B, T)} of int64 ids; targets of -1 do not count. With "weights" (B, T)
float32 beside them, the loss is the weighted sum Σ w·nll in place of the mean: what a mean over other batches too, or a
policy gradient, is made of.
Letters: B batch, T time, R rows = B·T or a chunk of them, C width, V vocabulary.

Evaluation of a model by its loss: bits per byte, a measure that does not depend on the tokenizer.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from nanochat import distributed
from nanochat.model import attention, gpt
from nanochat.model.gpt import LOGIT_CAP, Compute, ModelConfig, ParamsLike
from nanochat.model.linear import Linear, cast, dense, matmuls

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
    """Return (mean cross entropy in nats, aux) over the targets that count; zero, with zero gradients, for none.

    Args:
        params: as from `model.init`. batch: inputs and targets, and weights for a weighted sum in place of the mean.
        config, compute: as for `model.apply`.
        chunk_tokens: None differentiates plain operations, for any use with `torch.func`; a number computes loss and
            gradient in chunks of so many tokens, by a custom backward (`chunked_mean`): for training.

    Returns:
        0-d float32 loss, and {"targets": 0-d int64 number of targets that count}.
    """
    config = gpt.config_of(params, config, sharded=compute.gather is not None)
    targets, weights = batch["targets"], batch.get("weights")
    counted = (targets != IGNORE).sum()
    x_BTC = gpt.features(params, batch["inputs"], config=config, compute=compute)
    lm_head_VC = gpt.gathered(params, "lm_head", compute)
    if chunk_tokens is None:
        logits_BTV = gpt.unembed(x_BTC, lm_head_VC, config, compute)
        logits_RV, targets_R = logits_BTV.flatten(0, 1), targets.flatten()
        if weights is None:
            nll = F.cross_entropy(logits_RV, targets_R, ignore_index=IGNORE, reduction="sum")
            return nll / counted.clamp_min(1), {"targets": counted}
        nll_R = F.cross_entropy(logits_RV, targets_R, ignore_index=IGNORE, reduction="none")
        return (weights.flatten() * nll_R).sum(), {"targets": counted}
    x_RC, targets_R = x_BTC.flatten(0, 1), targets.flatten()
    weights_R = None if weights is None else weights.flatten()
    value = chunked(x_RC, lm_head_VC, targets_R, config.vocab_size, chunk_tokens, compute.linear, weights_R)
    return value, {"targets": counted}


def per_token(
    params: ParamsLike,
    batch: Batch,
    *,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross entropy of every token, (B, T) float32 nats, 0 where the target is -1. Arguments as above."""
    config = gpt.config_of(params, config, sharded=compute.gather is not None)
    x_BTC = gpt.features(params, batch["inputs"], config=config, compute=compute)
    x_RC, targets_R = x_BTC.flatten(0, 1), batch["targets"].flatten()
    losses, lm_head_VC = [], gpt.gathered(params, "lm_head", compute)
    for x, targets in zip(x_RC.split(chunk_tokens or len(x_RC)), targets_R.split(chunk_tokens or len(x_RC))):
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
    """Return the mean or weighted sum of the cross entropy of capped logits, with its gradient, in chunks of tokens.

    The gradient with respect to `x` and `lm_head` is made in the forward pass, while a chunk's logits are at hand,
    and only scaled in the backward: three matrix products in all, as in the plain form, and no (R, V) tensor. It is
    a custom backward, so it works under torch.autograd.grad and not under compiled torch.func.grad.

    Args:
        x_RC: (R, C) final activations. lm_head_VC: (V', C) float32, V' >= vocab_size. targets_R: (R,) int64.
        vocab_size: logits that take part. chunk_tokens: rows of a chunk.
        linear: one of nanochat.linear's, whose three products are used.
        weights_R: (R,) float32, of a sum; None: the mean over the targets that count.

    Returns:
        0-d float32, or float64 for such activations.
    """
    if torch.is_grad_enabled():
        args = (x_RC, lm_head_VC, targets_R, vocab_size, chunk_tokens, linear, weights_R)
        return _Chunked.apply(*args)[0]  # pyright: ignore
    total = attention.at_least_float32(x_RC.new_zeros(()))
    shares_R, scale = _shares(targets_R, weights_R, total.dtype)
    chunks = (tensor.split(chunk_tokens) for tensor in (x_RC, targets_R, shares_R))
    for x, targets, shares in zip(*chunks):
        total = total + _chunk(linear(x, lm_head_VC), targets, shares, vocab_size)[0]
    return total * scale


def _shares(targets_R: Tensor, weights_R: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (R,) factors of at most 1 on each token's loss, and a 0-d one on their sum.

    In float16 the gradient of a token's logits would underflow with a mean's 1/R in it, or overflow with a caller's
    factor: those are kept for the end.
    """
    counted_R = (targets_R != IGNORE).to(dtype)
    if weights_R is None:
        return counted_R, 1.0 / counted_R.sum().clamp_min(1)
    weights_R = weights_R.to(dtype) * counted_R
    largest = weights_R.abs().max()
    return weights_R / torch.where(largest > 0, largest, 1.0), largest


def _chunk(z_RV: Tensor, targets_R: Tensor, shares_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the summed loss of a chunk and what its gradient needs: tanh, exponentials, their sum.

    Args:
        z_RV: (R, V') logits before the cap, over the whole padded table: what is past `vocab_size` gets no weight.
        shares_R: (R,) factors on the tokens' losses, 0 where there is no target.
    """
    tanh_RV = torch.tanh(attention.at_least_float32(z_RV) / LOGIT_CAP)
    # Capped logits lie within ±15, so their exponentials need no maximum taken out first: one pass fewer.
    exp_RV = torch.exp(LOGIT_CAP * tanh_RV)
    if vocab_size < z_RV.shape[1]:
        exp_RV = torch.where(torch.arange(z_RV.shape[1], device=z_RV.device) < vocab_size, exp_RV, 0.0)
    sum_R = exp_RV.sum(-1)
    chosen_R = LOGIT_CAP * tanh_RV.gather(-1, targets_R.clamp_min(0)[:, None])[:, 0]
    return (shares_R * (sum_R.log() - chosen_R)).sum(), tanh_RV, exp_RV, sum_R


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        x_RC: Tensor,
        lm_head_VC: Tensor,
        targets_R: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        linear: Linear,
        weights_R: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = x_RC.dtype
        total = attention.at_least_float32(x_RC.new_zeros(()))
        shares_R, scale = _shares(targets_R, weights_R, total.dtype)
        grad_weight = torch.zeros(lm_head_VC.shape, dtype=total.dtype, device=x_RC.device)
        grad_x = []
        columns = torch.arange(lm_head_VC.shape[0], device=x_RC.device)
        # Every chunk, the last one too, has a multiple of these rows.
        products = matmuls(linear, math.gcd(len(x_RC), min(chunk_tokens, len(x_RC))), lm_head_VC)
        weight = products.operand(lm_head_VC, dtype)
        chunks = (tensor.split(chunk_tokens) for tensor in (x_RC, targets_R, shares_R))
        for x_chunk, targets, shares in zip(*chunks):
            x = products.operand(x_chunk, dtype)
            loss, tanh_RV, exp_RV, sum_R = _chunk(products.y(x, weight, dtype), targets, shares, vocab_size)
            total = total + loss
            # d loss / d z of z -> 15·tanh(z / 15): (softmax - one-hot)·(1 - tanh²); the chain of 15 and 1/15 cancels.
            softmax_RV = exp_RV * (shares / sum_R)[:, None]
            onehot_RV = torch.where(columns == targets[:, None], shares[:, None], 0.0)
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
        wide = attention.at_least_float32(grad_x)
        return (factor * wide).to(grad_x.dtype), factor * grad_weight, None, None, None, None, None


LossFn = Callable[[TensorDict, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


@torch.no_grad()
def bits_per_byte(
    params: TensorDict, batches: Iterable[Mapping[str, Tensor]], token_bytes_V: Tensor, loss_fn: LossFn
) -> float:
    """Return Σ nats / (ln 2 · Σ bytes) over the targets that stand for bytes, of all ranks' batches.

    Special tokens (0 bytes) and ignored targets are left out of both sums.

    Args:
        params: of the model, as a step computes with them. batches: {"inputs", "targets"} of (B, T) ids.
        token_bytes_V: (V,) int64, bytes that each token stands for, on the device of the batches.
        loss_fn: (params, batch) -> (mean nats over targets that count, {"targets": their number}).

    Raises:
        ValueError: no target stands for a byte.
    """
    nats = torch.zeros((), dtype=torch.float64)
    total_bytes = 0
    for batch in batches:
        targets = batch["targets"]
        sizes = token_bytes_V[targets.clamp_min(0)] * (targets != IGNORE)
        counted = {**batch, "targets": torch.where(sizes > 0, targets, IGNORE)}
        mean, aux = loss_fn(params, counted)
        nats += mean.cpu().double() * aux["targets"].cpu()
        total_bytes += int(sizes.sum())
    total_nats, total_bytes = distributed.all_reduce_sum([float(nats), total_bytes])
    if total_bytes == 0:
        raise ValueError("bits per byte: no target stands for a byte of text")
    return total_nats / (math.log(2) * total_bytes)
