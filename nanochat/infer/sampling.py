"""Drawing tokens from logits, for a batch of independently seeded rows.

A row's noise is a function of its seed, the token's position and the token's id: no generator, no state, nothing that
depends on other rows. With Gumbel noise g, argmax(logits + temperature·g) is a draw from softmax(logits / temperature),
and the most likely token at temperature 0.
Source: Gumbel-max (Maddison et al., arXiv 1411.0030); the mixing function is Wellons' hash32.
"""

import torch
from torch import Tensor

MASK_32 = 2**32 - 1
WEYL = 0x9E3779B1  # the golden ratio in 32 bits
ID_STEP = 2.0**-40  # orders equal logits in float64, and is too small to change the order of others


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
        logits_BV: float32, within ±16.
        temperature_B: float32; 0 takes the most likely token.
        top_k_B: int64; 0 draws among all tokens.
        position_B: int64, of the token to draw in its sequence.
        candidates: number of most likely tokens to sort out, at least each row's top_k.
        full_vocab: whether a row has top_k 0; otherwise only the candidates get noise. Neither changes what is drawn.
    """
    id_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    rank_BV = logits_BV.double() - id_V * ID_STEP
    rank_BK, id_BK = rank_BV.topk(min(candidates, logits_BV.shape[1]))
    last_B1 = (top_k_B - 1).clamp(0, rank_BK.shape[1] - 1)[:, None]
    least_B1 = torch.where(top_k_B[:, None] == 0, -torch.inf, rank_BK.gather(1, last_B1))
    if full_vocab:
        rank_BK, id_BK = rank_BV, id_V.expand_as(logits_BV)
    else:
        logits_BV = logits_BV.gather(1, id_BK)
    noise_BK = gumbel(seed_B[:, None], position_B[:, None], id_BK)
    noisy_BK = (logits_BV + temperature_B[:, None] * noise_BK).masked_fill(rank_BK < least_B1, -torch.inf)
    return id_BK.gather(1, noisy_BK.argmax(dim=1, keepdim=True))[:, 0]


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
