"""Sampling by full forward passes: plain, exact, and quadratic in the length."""

from collections.abc import Callable, Collection, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

LogitsFn = Callable[[TensorDict, Tensor], Tensor]


def choose(logits_BV: Tensor, *, temperature: float, top_k: int, generator: torch.Generator | None = None) -> Tensor:
    """Return one token id a row, (B,) int64.

    Args:
        logits_BV: float32. temperature: 0 takes the most likely. top_k: keep so many of the most likely, 0 all.
        generator: of the draws, on the CPU.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k:
        least = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    probs_BV = (logits_BV / temperature).softmax(-1).cpu()
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0].to(logits_BV.device)


@torch.no_grad()
def sample(
    params: TensorDict,
    prompt: Sequence[int],
    logits_fn: LogitsFn,
    *,
    max_tokens: int,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]:
    """Return the tokens that follow `prompt`, without it; they end before the first token of `stop`.

    Args:
        params: of the model. prompt: at least one id. logits_fn: (params, (1, T) ids) -> (1, T, V) logits.
        max_tokens: at most so many. temperature, top_k: see `choose`. seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    device = params["wte"].device
    ids = list(prompt)
    for _ in range(max_tokens):
        logits_BV = logits_fn(params, torch.tensor([ids], device=device))[:, -1]
        token = int(choose(logits_BV, temperature=temperature, top_k=top_k, generator=generator))
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]
