"""Causal attention with a sliding window, one signature for every kernel: `Attend = (q, k, v, window) -> out`.

A window w lets query i see the keys j with i - w <= j <= i, so w + 1 keys. Shapes: B batch, T time, N query heads,
K key/value heads (N a multiple of K), H head width.
"""

import math as _math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def mask(n_time: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the (T, T) boolean mask of the window: True where query i (row) may see key j (column)."""
    i = torch.arange(n_time, device=device)[:, None]
    j = torch.arange(n_time, device=device)[None, :]
    return (j <= i) & (j >= i - window)


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is in float64 (for derivatives checked by finite differences)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def math(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention in plain operations: the definition that the kernels are tested against.

    It holds all (B, N, T, T) scores, and it is the one to choose under `torch.func.jvp` and for second derivatives.

    Args:
        q_BTNH: queries. k_BTKH, v_BTKH: keys and values. All of one dtype.
        window: keys that a query sees before itself.

    Returns:
        (B, T, N, H), dtype of `q`.
    """
    n_time, n_head, width = q_BTNH.shape[1:]
    groups = n_head // k_BTKH.shape[2]
    k_BTNH, v_BTNH = k_BTKH.repeat_interleave(groups, 2), v_BTKH.repeat_interleave(groups, 2)
    scores_BNTS = at_least_float32(torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)) / _math.sqrt(width)
    scores_BNTS = scores_BNTS.masked_fill(~mask(n_time, window, q_BTNH.device), -torch.inf)
    return torch.einsum("bnts,bsnh->btnh", scores_BNTS.softmax(-1).to(v_BTNH.dtype), v_BTNH)


def sdpa(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention by torch's scaled_dot_product_attention; runs everywhere. Arguments as for `math`.

    A window shorter than the sequence is cut into blocks of `window` queries, each of which needs its own and the
    previous block of keys only: the work grows with T·window, where a (T, T) mask would pay for T².
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    if window >= q.shape[2] - 1:
        return _sdpa(q, k, v, is_causal=True).transpose(1, 2)
    return _banded(q, k, v, window).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # repeated by hand: enable_gqa has no batching rule and no fused CPU kernel
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, **how)


def _banded(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, window: int) -> Tensor:
    n_batch, _, n_time, _ = q_BNTH.shape
    block = max(window, 1)
    n_blocks = -(-n_time // block)
    pad = n_blocks * block - n_time  # padded keys lie in the future of every real query

    def cut(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, pad)).unflatten(2, (n_blocks, block))

    def batched(x: Tensor) -> Tensor:  # (B, heads, blocks, t, H) -> (B·blocks, heads, t, H)
        return x.transpose(1, 2).flatten(0, 1)

    q, k, v = cut(q_BNTH), cut(k_BKTH), cut(v_BKTH)
    first = _sdpa(q[:, :, 0], k[:, :, 0], v[:, :, 0], is_causal=True)
    pair = [batched(torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3)) for x in (k, v)]
    i = torch.arange(block, device=q.device)[:, None]
    j = torch.arange(2 * block, device=q.device)[None, :] - block
    rest = _sdpa(batched(q[:, :, 1:]), *pair, attn_mask=(j <= i) & (j >= i - window))
    rest = rest.unflatten(0, (n_batch, n_blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :n_time]


def make_flex(n_time: int, windows: tuple[int, ...], device: torch.device | str) -> Attend:
    """Return attention by flex_attention for sequences of `n_time` tokens, with its block masks made once.

    Call it outside of a compiled region, and use the result inside one: uncompiled, flex_attention is a slow
    reference. It skips the blocks that a window hides.
    """
    masks = {w: _block_mask(n_time, w, device) for w in set(windows)}

    def flex(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        grouped = q.shape[1] != k.shape[1]
        out = flex_attention(q, k, v, block_mask=masks[window], enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return flex


def _block_mask(n_time: int, window: int, device: torch.device | str) -> BlockMask:
    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - window)

    return create_block_mask(visible, None, None, n_time, n_time, device=str(device))


def choose(
    kernel: str,
    n_time: int,
    windows: tuple[int, ...],
    heads: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[str, Attend]:
    """Return (name, attention) for training at one shape.

    Args:
        kernel: auto, sdpa, flex or math. auto is flex on CUDA where a window hides something, and sdpa elsewhere.
        n_time: sequence length in tokens. windows: one per layer. heads: (N, K, H).
        device, dtype: where and in what it runs.

    Returns:
        The name of the kernel and its function. A kernel is chosen because a small forward and backward pass just
        ran here and gave the numbers of `math`, not because it could be imported.

    Raises:
        ValueError: the kernel that was asked for by name does not run here.
    """
    if kernel in ("math", "sdpa"):
        return kernel, {"math": math, "sdpa": sdpa}[kernel]
    if kernel not in ("auto", "flex"):
        raise ValueError(f"attention={kernel}: expected auto, sdpa, flex or math")
    if kernel == "auto" and (device.type != "cuda" or all(w >= n_time - 1 for w in windows)):
        return "sdpa", sdpa
    problem = probe_flex(heads, device, dtype)
    if problem is None:
        return "flex", make_flex(n_time, windows, device)
    if kernel == "flex":
        raise ValueError(f"attention=flex does not work on this {device.type} device ({problem}); set attention=sdpa")
    print(f"attention: flex_attention fails here ({problem}); using sdpa")
    return "sdpa", sdpa


def probe_flex(heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    """Run flex_attention forward and backward on a small input; return what is wrong with it, or None."""
    n_head, n_kv_head, width = heads
    n_time, window = 256, 128
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n_time, n, width) for n in (n_head, n_kv_head, n_kv_head)]
    inputs = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    try:
        compiled: Any = torch.compile(make_flex(n_time, (window,), device), fullgraph=True)
        outputs = compiled(*inputs, window)
        grads = torch.autograd.grad(outputs.float().square().sum(), inputs)
    except Exception as error:  # whatever a compiler or driver raises, the answer is: not here
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    with torch.enable_grad():
        wanted = math(inputs[0], inputs[1], inputs[2], window)
        wanted_grads = torch.autograd.grad(wanted.float().square().sum(), inputs)
    tolerance = 5e-2 if dtype != torch.float32 else 1e-2  # tf32-free float32, or half precision, over H terms
    for got, want in zip((outputs, *grads), (wanted, *wanted_grads)):
        if not torch.allclose(got.float(), want.float(), atol=tolerance * want.float().abs().max().item(), rtol=0):
            return "its numbers differ from the plain ones"
    return None
