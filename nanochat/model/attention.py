"""Causal attention with a sliding window, one signature for every kernel: `Attend = (q, k, v, window) -> out`.

A window w lets query i see the keys j with i - w <= j <= i, so w + 1 keys. Shapes: B batch, T time, N query heads,
K key/value heads (N a multiple of K), H head width.
"""

import functools
import importlib
import inspect
import math as _math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nanochat.distributed import synchronize

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


def cudnn(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention by cuDNN, for windows that hide nothing. Arguments as for `math`."""
    if window < q_BTNH.shape[1] - 1:
        raise ValueError("cuDNN has no sliding window")
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention by torch's own flash kernel, windows included. Arguments as for `math`.

    scaled_dot_product_attention does not pass a window on to it; the operator below it takes one.
    """
    n_time = q_BTNH.shape[1]
    left = window if window < n_time - 1 else -1
    how = {"window_size_left": left, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(
        q_BTNH, k_BTKH, v_BTKH, None, None, n_time, n_time, 0.0, True, False, **how
    )[0]


def torch_fa3() -> Attend:
    """Return `flash`, after torch has put the installed flash_attn_interface in its place in this process."""
    torch.nn.attention.activate_flash_attention_impl("FA3")
    return flash


def from_package(module: str) -> Attend:
    """Return attention by the `flash_attn_func` of an installed package, or of a kernel of the Hugging Face hub."""
    if module == FA3_HUB:
        func = hub_kernel(module).flash_attn_func
    else:
        func = importlib.import_module(module).flash_attn_func

    def package(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        left = window if window < q_BTNH.shape[1] - 1 else -1
        out = func(q_BTNH, k_BTKH, v_BTKH, causal=True, window_size=(left, 0))
        return out[0] if isinstance(out, tuple) else out  # early versions return the log-sum-exp as well

    return package


def hub_kernel(name: str) -> Any:
    """Return the module of a compiled kernel, downloaded by the `kernels` package where it is installed."""
    get_kernel: Any = importlib.import_module("kernels").get_kernel
    takes_version = "version" in inspect.signature(get_kernel).parameters  # newer ones insist on it
    return get_kernel(name, version=1) if takes_version else get_kernel(name)


FA3_HUB = "kernels-community/flash-attn3"
# Name -> (sequence length, windows, device) -> attention. Names, not functions, go from rank to rank.
KERNELS: dict[str, Callable[[int, tuple[int, ...], torch.device], Attend]] = {
    "math": lambda *_: math,
    "sdpa": lambda *_: sdpa,
    "flex": make_flex,
    "cudnn": lambda *_: cudnn,
    "flash": lambda *_: flash,
    "fa2": lambda *_: from_package("flash_attn"),
    "fa3": lambda *_: from_package("flash_attn_interface"),
    "fa3_hub": lambda *_: from_package(FA3_HUB),
    "fa3_torch": lambda *_: torch_fa3(),  # after the others: while it is active, flash is FA3 too
}


def build(names: Mapping[int, str], n_time: int, device: torch.device) -> Attend:
    """Return the attention of a choice: for each window its kernel.

    Args:
        names: window -> one of KERNELS. n_time: sequence length in tokens. device: where it runs.
    """
    kernels = {}
    for name in sorted(set(names.values()), key=list(KERNELS).index):
        kernels[name] = KERNELS[name](n_time, tuple(w for w in names if names[w] == name), device)
    if len(kernels) == 1:
        return next(iter(kernels.values()))

    def by_window(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        return kernels[names[window]](q_BTNH, k_BTKH, v_BTKH, window)

    return by_window


class Choice(NamedTuple):
    """A kernel for each window, as a value that ranks can agree on, and a sentence for people."""

    names: dict[int, str]
    text: str


def choose(
    kernel: str,
    n_time: int,
    windows: tuple[int, ...],
    heads: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int = 1,
    compile: bool = True,
) -> Choice:
    """Return the kernel of each window for training at one shape; `build` makes the function of it.

    Args:
        kernel: auto, fa3 (from wherever it is to be had), or one of KERNELS. auto is sdpa on the CPU; on CUDA it is
            for each window the fastest of all that run here.
        n_time: sequence length in tokens. windows: one per layer. heads: (N, K, H).
        device, dtype: where and in what it runs. rows: sequences a micro-batch, as many as will be used.
        compile: whether it will be compiled.

    A kernel is chosen because it just ran here, forward and backward, and gave the numbers of `math`, not because it
    could be imported. It forgets what was compiled before (torch.compiler.reset), so call it at the start.

    Raises:
        ValueError: the kernel that was asked for by name is unknown, or does not run here.
    """
    distinct = tuple(sorted(set(windows)))
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"attention={kernel}: expected auto, {', '.join(KERNELS)}")
    if kernel in ("math", "sdpa") or (kernel == "auto" and device.type != "cuda"):
        name = "sdpa" if kernel == "auto" else kernel
        return Choice(dict.fromkeys(distinct, name), name)
    if kernel == "flex" and not compile:
        raise ValueError("attention=flex needs compile=true: uncompiled it is slow and holds all scores")
    try:
        return fastest(FAMILIES.get(kernel, (kernel,)), n_time, distinct, heads, device, dtype, rows, compile)
    except ValueError as error:
        raise ValueError(
            f"attention={kernel} does not work on this {device.type} device ({error}); set attention=sdpa"
        ) from None


FAMILIES = {"auto": tuple(name for name in KERNELS if name != "math"), "fa3": ("fa3", "fa3_hub", "fa3_torch")}
PROBE_TOKENS = 65536  # more rows than these make no kernel faster
MATH_LIMIT_TOKENS = 8192  # scores of one longer sequence would fill a small GPU
TOLERANCE = 0.01  # mean over positions; half precision makes 0.004, one key more or less at 512 of 2048 makes 0.016


@functools.cache  # a trial takes seconds, and a benchmark asks several times
def fastest(
    candidates: tuple[str, ...],
    n_time: int,
    windows: tuple[int, ...],
    heads: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    compile: bool,
) -> Choice:
    """Return for each window the candidate that is right and took the least time. Arguments as for `choose`.

    Raises:
        ValueError: none of them is right for one of the windows; says what is wrong with each.
    """
    names, texts = {}, []
    for window in windows:
        sample = _sample(n_time, window, heads, device, dtype, rows)
        seconds, problems = {}, {}
        for name in candidates:
            if name == "flex" and not compile:
                continue
            try:
                seconds[name] = trial(name, sample, compile=compile)
            except Exception as error:  # whatever a package, compiler or driver raises, the answer is: not here
                problems[name] = _reason(error)
            finally:
                if name == "fa3_torch":  # only `build` leaves it in the place of flash
                    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        if not seconds:
            raise ValueError("; ".join(f"{name}: {why}" for name, why in problems.items()))
        order = sorted(seconds, key=lambda name: seconds[name])
        names[window] = order[0]
        others = ", ".join(f"{name} {1e3 * seconds[name]:.2f}" for name in order[1:])
        texts.append(f"window {window}: {order[0]} {1e3 * seconds[order[0]]:.2f} ms{others and f' ({others})'}")
    return Choice(names, "; ".join(texts))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "debug context" in line]  # the compiler's first line says nothing
    return f"{type(error).__name__}: {' '.join(told or lines)[:200]}"


class _Sample(NamedTuple):
    """Inputs of a trial, and what comes out for the first row and group of heads in float32: out and gradients."""

    window: int
    inputs: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    wanted: list[Tensor]


def _sample(
    n_time: int, window: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rows: int
) -> _Sample:
    n_head, n_kv_head, width = heads
    rows = max(1, min(rows, PROBE_TOKENS // n_time))
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        one = torch.randn(1, n_time, n, width, generator=generator)  # rows may be alike: they are computed apart
        return one.to(device, dtype).expand(rows, -1, -1, -1).contiguous()

    q, k, v, grad = draw(n_head), draw(n_kv_head), draw(n_kv_head), draw(n_head)
    group = n_head // n_kv_head
    few = [x[:1, :, :n].float().requires_grad_() for x, n in ((q, group), (k, 1), (v, 1))]
    reference = math if n_time <= MATH_LIMIT_TOKENS else sdpa
    with torch.enable_grad():
        out = reference(few[0], few[1], few[2], window)
        grads = torch.autograd.grad(out, few, grad[:1, :, :group].float())
    return _Sample(window, (q, k, v), grad, [out.detach(), *grads])


def trial(name: str, sample: _Sample, *, compile: bool = True) -> float:
    """Return the seconds of a forward and backward pass of a kernel at a sample's shape.

    Raises:
        ValueError: its numbers are not those of `math`. Whatever else the kernel raises that does not run here.
    """
    n_time, device = sample.grad.shape[1], sample.grad.device
    attend = build({sample.window: name}, n_time, device)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, sample.window)

    torch.compiler.reset()  # each trial is one more version of `forward`, and their number is limited
    run: Any = torch.compile(forward, fullgraph=True) if compile else forward
    leaves = [x.detach().requires_grad_() for x in sample.inputs]

    def step() -> list[Tensor]:
        with torch.enable_grad():
            out = run(*leaves)
        return [out, *torch.autograd.grad(out, leaves, sample.grad)]

    _check(step(), sample)
    _check_border(run, sample)
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):  # in a row, so that the GPU does not wait for Python
            step()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / 5)
    return best


def _check(results: list[Tensor], sample: _Sample) -> None:
    """Raise ValueError where results are further from the wanted ones than half precision explains."""
    for what, got, want in zip(("output", "grad q", "grad k", "grad v"), results, sample.wanted):
        if got.dtype != sample.grad.dtype or got.shape[:2] != sample.grad.shape[:2]:
            raise ValueError(f"its {what} is {got.dtype} {tuple(got.shape)}")
        error = torch.linalg.vector_norm(got[:1, :, : want.shape[2]].float() - want, dim=(0, 2, 3))
        size = torch.linalg.vector_norm(want, dim=(0, 2, 3))
        distance = (error / size.clamp_min(size.mean())).mean().item()
        if not distance <= TOLERANCE:  # a NaN is no match either
            raise ValueError(f"its {what} differs from the plain one by {distance:.1%}")


def _check_border(run: Callable[[Tensor, Tensor, Tensor], Tensor], sample: _Sample) -> None:
    """Raise ValueError where the last query does not see exactly the keys of its window, to the key."""
    last = sample.grad.shape[1] - 1
    first = max(last - sample.window, 0)
    mark = torch.zeros_like(sample.inputs[2])
    mark[:, first, :, 0] = 1
    if first > 0:
        mark[:, first - 1, :, 1] = 1
    mark[:, last, :, 2] = 1
    q, k, v = (x.detach().requires_grad_() for x in (*sample.inputs[:2], mark))  # or it would be compiled once more
    with torch.enable_grad():
        seen = (run(q, k, v)[0] > 0).all(1)  # (T, H): whether every head saw the mark
    if not (seen[last, 0] and not seen[last, 1] and seen[last, 2] and not seen[last - 1, 2]):
        raise ValueError("its window is another one")
