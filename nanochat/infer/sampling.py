"""Drawing tokens from logits, for a batch of independently seeded rows.

A row's noise is a function of its seed, the token's position and the token's id: no generator, no state, nothing that
depends on other rows. With Gumbel noise g, argmax(logits + temperature·g) is a draw from softmax(logits / temperature),
and the most likely token at temperature 0.
Source: Gumbel-max (Maddison et al., arXiv 1411.0030); the mixing function is Wellons' hash32.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.infer.request import MAX_TOP_LOGPROBS, NO_FILTERS, Request, TokenLogprobs

MASK_32 = 2**32 - 1
WEYL = 0x9E3779B1  # the golden ratio in 32 bits
# The ways of drawing: settings of `draw`, and of `draw_filtered`. A way has a name, since torch.compile makes a number
# that changes between calls symbolic, but not one that it finds under a name.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"candidates": 1, "full_vocab": False},
    "usual": {"candidates": 64, "full_vocab": False},
    "general": {"candidates": 256, "full_vocab": True},
    "filtered": {"candidates": 1, "full_vocab": True},
    "sorted": {"candidates": 2**31, "full_vocab": True},  # rare, so compiled when it is first needed
}


def cheapest_way(requests: Sequence[Request]) -> str:
    """Return the name of the cheapest way of drawing that serves all requests."""
    if any(request.is_filtered for request in requests):
        return "filtered"
    top_ks = [request.top_k for request in requests if request.temperature > 0 and request.top_k != 1]
    if not top_ks:
        return "greedy"
    if all(0 < top_k <= WAYS["usual"]["candidates"] for top_k in top_ks):
        return "usual"
    return "general" if max(top_ks) <= WAYS["general"]["candidates"] else "sorted"


def draw(
    logits_BV: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
    candidates: int,
    full_vocab: bool,
) -> Tensor:
    """Return one token id per row, (B,) int64.

    Of equal logits, frequent in bfloat16, the lower id ranks first, so top_k always keeps exactly k tokens, the same
    ones for any number of candidates.

    Args:
        logits_BV: float32.
        temperature_B: float32; 0 takes the most likely token.
        top_k_B: int64; 0 draws among all tokens.
        position_B: int64, of the token to draw in its sequence.
        candidates: number of most likely tokens to sort out, at least each row's top_k.
        full_vocab: whether a row has top_k 0; otherwise only the candidates get noise. Neither changes what is drawn.
    """
    if candidates == 1 and not full_vocab:
        return logits_BV.argmax(dim=1)  # of equal ones the lowest id
    value_BK, id_BK = most_likely(logits_BV, min(candidates, logits_BV.shape[1]))
    if full_vocab:
        last_B1 = (top_k_B - 1).clamp(0, id_BK.shape[1] - 1)[:, None]
        least_B1, last_id_B1 = value_BK.gather(1, last_B1), id_BK.gather(1, last_B1)
        value_BK, id_BK = logits_BV, torch.arange(logits_BV.shape[1], device=logits_BV.device).expand_as(logits_BV)
        kept_BK = (value_BK > least_B1) | (value_BK == least_B1) & (id_BK <= last_id_B1) | (top_k_B[:, None] == 0)
    else:
        kept_BK = torch.arange(id_BK.shape[1], device=logits_BV.device) < top_k_B[:, None]
    noise_BK = gumbel(seed_B[:, None], position_B[:, None], id_BK)
    noisy_BK = (value_BK + temperature_B[:, None] * noise_BK).masked_fill(~kept_BK, -torch.inf)
    return id_BK.gather(1, noisy_BK.argmax(dim=1, keepdim=True))[:, 0]


def most_likely(logits_BV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return values and ids, (B, n), of the largest logits, the largest first, and of equal ones the lower id.

    Of blocks of the vocabulary, those with the n largest maxima hold them all.
    """
    n_rows, n_vocab = logits_BV.shape
    if n_vocab <= (64 if n_rows == 1 else 16) * n:  # one row is a matter of few kernels, not of few values
        id_BN = _top(logits_BV, n)
        return logits_BV.gather(1, id_BN), id_BN
    width = max(8, math.isqrt(n_vocab // n))  # the fewest values to sort in both rounds
    block_BMW = F.pad(logits_BV, (0, -n_vocab % width), value=-torch.inf).unflatten(1, (-1, width))
    best_BN = _top(block_BMW.amax(2), n).sort(dim=1).values
    value_BV = block_BMW.gather(1, best_BN[:, :, None].expand(-1, -1, width)).flatten(1)
    index_BN = _top(value_BV, n)
    return value_BV.gather(1, index_BN), best_BN.gather(1, index_BN // width) * width + index_BN % width


def _top(x_BV: Tensor, n: int) -> Tensor:
    """Return the indices of the n largest values in order, of equal ones the lower index first; `topk` takes any.

    An integer orders both: the bits of a float32 above, those of the index below.
    """
    bits_BV = (x_BV.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)
    rank_BV = ordered_BV.long() * 2**32 - torch.arange(x_BV.shape[1], device=x_BV.device)
    return rank_BV.topk(n, dim=1).indices


def draw_filtered(
    logits_BV: Tensor,
    filters: dict[str, Tensor],
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    fed_B: Tensor,
    is_new_B: Tensor,
    **settings: Any,
) -> Tensor:
    """Return one token id per row, (B,) int64, with all settings of a request.

    In this order: repetition penalty (arXiv 1909.05858) over prompt and answer, frequency and presence penalty over the
    answer, logit_bias, temperature, top_k, top_p (arXiv 1904.09751), min_p (arXiv 2407.01082); each as vLLM defines it,
    the last four in the order of Hugging Face's `generate`. top_p and min_p see the distribution that is left before
    them, and keep at least the most likely token. A row that sets none of them draws what `draw` does.

    Args:
        filters: from `empty_filters`, of these rows; its counts are updated.
        fed_B: int64, the token of each row that the logits follow. is_new_B: bool, whether to count it.
        settings: of `draw`, for rows whose top_k is already applied.
    """
    top_p, min_p, repetition, presence, frequency = filters["values"].unsqueeze(1).unbind(2)  # each (B, 1)
    seen_BV = filters["seen"].scatter_add_(1, fed_B[:, None], 2 * is_new_B[:, None].int())
    penalized_BV = torch.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
    x_BV = torch.where(seen_BV > 0, penalized_BV, logits_BV)
    count_BV = seen_BV >> 1
    x_BV = x_BV - frequency * count_BV - presence * (count_BV > 0) + filters["bias"]

    sorted_BV, id_BV = x_BV.sort(dim=1, descending=True, stable=True)
    place_V = torch.arange(x_BV.shape[1], device=x_BV.device)
    heat_B1 = torch.where(temperature_B > 0, temperature_B, 1)[:, None]  # a greedy row has top_k 1
    kept_BV = (place_V < top_k_B[:, None]) | (top_k_B[:, None] == 0)
    prob_BV = ((sorted_BV - sorted_BV[:, :1]) / heat_B1).masked_fill(~kept_BV, -torch.inf).softmax(1)
    kept_BV &= (prob_BV.cumsum(1) - prob_BV < top_p) | (top_p >= 1)
    kept_BV &= prob_BV >= min_p * prob_BV[:, :1]
    kept_BV |= place_V == 0
    x_BV = x_BV.masked_fill(~kept_BV.scatter(1, id_BV, kept_BV), -torch.inf)
    return draw(x_BV, temperature_B=temperature_B, top_k_B=torch.zeros_like(top_k_B), **settings)


def empty_filters(rows: int, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Return the settings of `draw_filtered` for rows that leave them off.

    values  (B, 5) float32   `Request.filters`
    seen    (B, V) int32     2·(how often a token is in the answer) + (whether it is in the prompt)
    bias    (B, V) float32   what is added to the logits
    """
    return {
        "values": torch.tensor(NO_FILTERS, device=device).repeat(rows, 1),
        "seen": torch.zeros(rows, vocab_size, dtype=torch.int32, device=device),
        "bias": torch.zeros(rows, vocab_size, device=device),
    }


def set_filters_(filters: dict[str, Tensor], row: int, request: Request) -> None:
    """Give a row the settings of a request of which the last prompt token is still to feed."""
    filters["values"][row] = torch.tensor(request.filters)
    filters["seen"][row] = 0
    filters["seen"][row, list(set(request.prompt))] = 1
    filters["seen"][row, request.prompt[-1]] = -1  # it will be counted as if it were new
    filters["bias"][row] = 0
    for token, bias in request.logit_bias:
        filters["bias"][row, token] += bias


def pack(drawn_B: Tensor, logits_BV: Tensor) -> Tensor:
    """Return (B, 1 + MAX_TOP_LOGPROBS, 2) float32: ids and log-probabilities of the drawn and the likeliest tokens."""
    logprob_BV = logits_BV.log_softmax(1)
    _, top_BK = most_likely(logits_BV, min(MAX_TOP_LOGPROBS, logits_BV.shape[1]))
    id_BK = torch.cat([drawn_B[:, None], top_BK], dim=1)
    return torch.stack([id_BK.float(), logprob_BV.gather(1, id_BK.clamp(min=0))], dim=2)  # exact up to 2**24


def unpack(packed: Sequence[Sequence[float]], n_top: int) -> TokenLogprobs:
    """Return the log-probabilities of one row of `pack`, with `n_top` alternatives."""
    return TokenLogprobs(packed[0][1], tuple((int(token), logprob) for token, logprob in packed[1 : 1 + n_top]))


def gumbel(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Return standard Gumbel noise in float32, a function of three int64 tensors that broadcast."""
    row = _mix(_mix(seed ^ (seed >> 32)) + position)
    bits = _mix(row + token * WEYL)
    uniform = ((bits >> 9).float() + 0.5) / 2**23  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """Return 32 bits, in int64, each of which depends on each of the lowest 32 of `x`; products stay below 2⁶³."""
    x = (x + WEYL) & MASK_32  # 0 would stay 0
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK_32
    return x ^ (x >> 16)
