"""A checksum of a tensor that is computed where the tensor lies and adds up over its shards."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fingerprint(shard: Tensor, offsets: Sequence[int] | None = None) -> int:
    """Return a 64-bit checksum of a tensor's bits and their positions; the values of its shards add up to the whole's.

        Σ bits(x[i, j, …]) · w₀[i] · w₁[j] · …   modulo 2**64,  with odd pseudo-random weights per dimension.

    A change of one element always shows (an odd multiple of less than 2**32 is not 0 modulo 2**64); exchanged
    elements, rows or leaves do, but for a chance of about 2**-32. Runs on the tensor's device in bounded memory.

    Args:
        shard: any dtype of 1, 2, 4 or 8 bytes; the tensor, or a block of it.
        offsets: where the block begins in the whole tensor, per dimension; None: at 0.

    Returns:
        An integer in [0, 2**64). For shards: sum(fingerprint(s, o) for s, o in …) % 2**64.
    """
    return int(checksum(shard, offsets)) % 2**64


def checksum(shard: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
    """Return `fingerprint`, modulo 2**64, as a 0-d int64 tensor on the shard's device: nothing waits for the device."""
    bits = shard.detach()
    begin = list(offsets) if offsets is not None else [0] * bits.ndim
    if bits.ndim == 0:
        bits, begin = bits.reshape(1), [0]
    if bits.element_size() == 8:  # as halves: an element's difference must stay below 2**32
        bits = bits.contiguous().view(torch.int32)
        begin[-1] *= 2
    else:
        bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[bits.element_size()])
    # Large enough to amortise the launches, small enough for the cache (CPU) and for bounded memory (GPU).
    chunk_elements = min(2**24 if bits.is_cuda else 2**19, bits.numel())
    # One buffer for all chunks: the first touch of fresh memory costs more than the sums.
    scratch = torch.empty(chunk_elements, dtype=torch.int64, device=bits.device)
    return _weighted_sum(bits, begin, scratch)


def _weighted_sum(bits: Tensor, begin: list[int], scratch: Tensor) -> Tensor:
    if bits.numel() > scratch.numel():
        dim = next(d for d, n in enumerate(bits.shape) if n > 1)
        half = bits.shape[dim] // 2
        middle = [b + half if d == dim else b for d, b in enumerate(begin)]
        first = _weighted_sum(bits.narrow(dim, 0, half), begin, scratch)
        return first + _weighted_sum(bits.narrow(dim, half, bits.shape[dim] - half), middle, scratch)
    total = scratch[: bits.numel()].view(bits.shape).copy_(bits)
    for dim in reversed(range(bits.ndim)):
        total = total.mul_(_odd_weights(dim, begin[dim], bits.shape[dim], bits.device)).sum(-1)
    return total


def _odd_weights(dim: int, begin: int, count: int, device: torch.device) -> Tensor:
    # The mixing steps of splitmix64 (Steele, Lea, Flood 2014), in int64 that wraps; `& mask` makes >> a logical shift.
    x = torch.arange(begin + 1, begin + 1 + count, dtype=torch.int64, device=device)
    x = (x + (dim << 40)) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 31) & (2**33 - 1))) | 1
