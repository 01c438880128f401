"""Causal attention with a sliding window, one signature for every kernel: `Attend = (q, k, v, window) -> out`.

A window w lets query i see keys j with i - w <= j <= i, so w + 1 keys. Letters: B batch, T time, N query heads,
K key/value heads (N is a multiple of K), H head width.
"""

import functools
import importlib
import inspect
import math as _math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanochat.distributed import time_best
from nanochat.tree import at_least_float32

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def mask(n_time: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the (T, T) boolean mask, True where query i (row) may see key j (column)."""
    i = torch.arange(n_time, device=device)[:, None]
    j = torch.arange(n_time, device=device)[None, :]
    return (j <= i) & (j >= i - window)


def math(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention (B, T, N, H) in plain operations: the definition that kernels are tested against.

    It holds all (B, N, T, T) scores. Use it under `torch.func.jvp` and for second derivatives.
    """
    n_time, n_head, head_dim = q_BTNH.shape[1:]
    groups = n_head // k_BTKH.shape[2]
    k_BTNH, v_BTNH = k_BTKH.repeat_interleave(groups, 2), v_BTKH.repeat_interleave(groups, 2)
    scores_BNTS = at_least_float32(torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)) / _math.sqrt(head_dim)
    scores_BNTS = scores_BNTS.masked_fill(~mask(n_time, window, q_BTNH.device), -torch.inf)
    return torch.einsum("bnts,bsnh->btnh", scores_BNTS.softmax(-1).to(v_BTNH.dtype), v_BTNH)


def sdpa(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention by torch's scaled_dot_product_attention; runs everywhere.

    A window shorter than the sequence is computed in blocks of `window` queries, which need only their own and the
    previous block of keys: T·window of work instead of T².
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    if window >= q.shape[2] - 1:
        return _sdpa(q, k, v, is_causal=True).transpose(1, 2)
    return _banded(q, k, v, window).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # enable_gqa has no batching rule and no fused CPU kernel
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def _banded(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, window: int) -> Tensor:
    n_batch, _, n_time, _ = q_BNTH.shape
    block = max(window, 1)
    n_blocks = -(-n_time // block)
    pad = n_blocks * block - n_time  # padded keys are in the future of every real query

    def to_blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, pad)).unflatten(2, (n_blocks, block))

    def fold(x: Tensor) -> Tensor:  # (B, heads, blocks, t, H) -> (B·blocks, heads, t, H)
        return x.transpose(1, 2).flatten(0, 1)

    q, k, v = to_blocks(q_BNTH), to_blocks(k_BKTH), to_blocks(v_BKTH)
    first = _sdpa(q[:, :, 0], k[:, :, 0], v[:, :, 0], is_causal=True)
    pairs = [fold(torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3)) for x in (k, v)]
    i = torch.arange(block, device=q.device)[:, None]
    j = torch.arange(2 * block, device=q.device)[None, :] - block
    rest = _sdpa(fold(q[:, :, 1:]), *pairs, attn_mask=(j <= i) & (j >= i - window))
    rest = rest.unflatten(0, (n_batch, n_blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :n_time]


def make_flex(n_time: int, windows: tuple[int, ...], device: torch.device | str) -> Attend:
    """Return attention by flex_attention for sequences of `n_time` tokens, with its block masks made once.

    Call it outside of a compiled region and the result inside one: uncompiled, flex_attention is slow.
    """

    def block_mask(window: int) -> Any:
        def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (j >= i - window)

        return create_block_mask(visible, None, None, n_time, n_time, device=str(device))

    masks = {window: block_mask(window) for window in set(windows)}

    def flex(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        out: Any = flex_attention(q, k, v, block_mask=masks[window], enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return flex


def cudnn(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention by cuDNN, which has no sliding window."""
    if window < q_BTNH.shape[1] - 1:
        raise ValueError("cuDNN has no sliding window")
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
    """Attention by torch's flash kernel; its operator takes a window, which scaled_dot_product_attention does not."""
    n_time = q_BTNH.shape[1]
    left = window if window < n_time - 1 else -1
    args = (q_BTNH, k_BTKH, v_BTKH, None, None, n_time, n_time, 0.0, True, False)
    return torch.ops.aten._flash_attention_forward(*args, window_size_left=left, window_size_right=0)[0]


def flash_fa3() -> Attend:
    """Return `flash`, after making torch run it by the installed flash_attn_interface, for the whole process."""
    torch.nn.attention.activate_flash_attention_impl("FA3")
    return flash


def external_flash(module: str) -> Attend:
    """Return attention by the `flash_attn_func` of an installed package, or of a kernel from the Hugging Face Hub."""
    source = hub_kernel(module) if module == FA3_HUB else importlib.import_module(module)
    flash_attn_func = source.flash_attn_func

    def attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        left = window if window < q_BTNH.shape[1] - 1 else -1
        out = flash_attn_func(q_BTNH, k_BTKH, v_BTKH, causal=True, window_size=(left, 0))
        return out[0] if isinstance(out, tuple) else out  # early versions return the log-sum-exp too

    return attend


def hub_kernel(name: str) -> Any:
    get_kernel: Any = importlib.import_module("kernels").get_kernel
    takes_version = "version" in inspect.signature(get_kernel).parameters  # required by newer versions
    return get_kernel(name, version=1) if takes_version else get_kernel(name)


FA3_HUB = "kernels-community/flash-attn3"
# Name -> (sequence length, windows, device) -> attention. Ranks exchange names, not functions.
KERNELS: dict[str, Callable[[int, tuple[int, ...], torch.device], Attend]] = {
    "math": lambda *_: math,
    "sdpa": lambda *_: sdpa,
    "flex": make_flex,
    "cudnn": lambda *_: cudnn,
    "flash": lambda *_: flash,
    "fa2": lambda *_: external_flash("flash_attn"),
    "fa3": lambda *_: external_flash("flash_attn_interface"),
    "fa3_hub": lambda *_: external_flash(FA3_HUB),
    "fa3_torch": lambda *_: flash_fa3(),  # last: while it is active, flash is FA3 too
}
CUSTOM_BACKWARD = {"fa2", "fa3", "fa3_hub"}  # in an autograd.Function that torch.func does not see
# What auto and fa3 try.
CANDIDATES = {"auto": tuple(name for name in KERNELS if name != "math"), "fa3": ("fa3", "fa3_hub", "fa3_torch")}


def build(names: Mapping[int, str], n_time: int, device: torch.device) -> Attend:
    """Return attention that uses for each window the kernel that `names` gives, {window: one of KERNELS}."""
    kernels = {}
    for name in sorted(set(names.values()), key=list(KERNELS).index):
        kernels[name] = KERNELS[name](n_time, tuple(w for w in names if names[w] == name), device)
    if len(kernels) == 1:
        return next(iter(kernels.values()))

    def attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        return kernels[names[window]](q_BTNH, k_BTKH, v_BTKH, window)

    return attend


class KernelChoice(NamedTuple):
    """A kernel for each window, and a description for the log."""

    names: dict[int, str]
    text: str


PROBE_TOKENS = 65536  # more rows than this change no ranking
MATH_LIMIT_TOKENS = 8192  # the scores of a longer sequence would fill a small GPU
TOLERANCE = 0.01  # mean over positions; half precision makes 0.004, one key more or less at 512 of 2048 makes 0.016


@functools.cache  # a benchmark takes seconds
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
    torch_func: bool = False,
) -> KernelChoice:
    """Return the kernel of each window for training at one shape; `build` makes the function.

    Resets torch.compile's caches, so call it before anything is compiled.

    Args:
        kernel: auto (on CUDA the fastest that gives the numbers of `math`, else sdpa), fa3 (from any source), or one
            of KERNELS.
        n_time: sequence length in tokens. windows: one per layer. heads: (N, K, H).
        rows: sequences per micro-batch. compile: whether it will be compiled. torch_func: of TrainConfig.grad.
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"attention={kernel}: expected auto, {', '.join(KERNELS)}")
    if kernel in ("math", "sdpa") or (kernel == "auto" and device.type != "cuda"):
        name = "sdpa" if kernel == "auto" else kernel
        return KernelChoice(dict.fromkeys(windows, name), name)
    if kernel == "flex" and not compile:
        raise ValueError("attention=flex needs compile=true: uncompiled it is slow and holds all scores")
    names, texts, problems, working = {}, [], {}, set()
    for window in sorted(set(windows)):
        example = make_example(n_time, window, heads, device, dtype, rows)
        seconds = {}
        for name in CANDIDATES.get(kernel, (kernel,)):
            if name == "flex" and (torch_func or not compile):
                continue
            try:
                seconds[name] = benchmark_and_verify(name, example, compile=compile)
            except Exception as error:  # whatever a package, compiler or driver raises: it does not work here
                problems[name] = _reason(error)
            finally:
                if name == "fa3_torch":
                    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        if not seconds:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in problems.items())
            problem = f"attention={kernel} does not work on this {device.type} device"
            raise ValueError(f"{problem} ({reasons}); set attention=sdpa")
        working |= set(seconds)
        fastest, *others = sorted(seconds, key=lambda name: seconds[name])
        names[window] = fastest
        slower = ", ".join(f"{name} {1e3 * seconds[name]:.2f}" for name in others)
        texts.append(f"window {window}: {fastest} {1e3 * seconds[fastest]:.2f} ms{slower and f' ({slower})'}")
    texts += [f"no {name}: {reason}" for name, reason in problems.items() if name not in working]
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if hopper and not working.intersection(CANDIDATES["fa3"]):
        texts.append('FlashAttention 3, made for this GPU, is missing: pip install -e ".[gpu]"')
    return KernelChoice(names, "; ".join(texts))


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    context = [line for line in lines if "debug context" in line]  # the compiler's first line says nothing
    return f"{type(error).__name__}: {' '.join(' '.join(context or lines).split())[:200]}"


class Example(NamedTuple):
    """Inputs, and the float32 output and gradients for the first row and the first group of heads."""

    window: int
    inputs: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    expected: list[Tensor]


def make_example(
    n_time: int, window: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rows: int
) -> Example:
    n_head, n_kv_head, head_dim = heads
    rows = max(1, min(rows, PROBE_TOKENS // n_time))
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        row = torch.randn(1, n_time, n, head_dim, generator=generator)
        return row.to(device, dtype).expand(rows, -1, -1, -1).contiguous()

    q, k, v, grad = draw(n_head), draw(n_kv_head), draw(n_kv_head), draw(n_head)
    group = n_head // n_kv_head
    leaves = [x[:1, :, :n].float().requires_grad_() for x, n in ((q, group), (k, 1), (v, 1))]
    reference = math if n_time <= MATH_LIMIT_TOKENS else sdpa
    with torch.enable_grad():
        out = reference(leaves[0], leaves[1], leaves[2], window)
        grads = torch.autograd.grad(out, leaves, grad[:1, :, :group].float())
    return Example(window, (q, k, v), grad, [out.detach(), *grads])


def benchmark_and_verify(name: str, example: Example, *, compile: bool = True) -> float:
    """Return the seconds of a kernel's forward and backward pass; raises ValueError if it does not compute `math`."""
    n_time, device = example.grad.shape[1], example.grad.device
    attend = build({example.window: name}, n_time, device)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, example.window)

    torch.compiler.reset()  # each benchmark is one more version of `forward`, and their number is limited
    run: Any = torch.compile(forward, fullgraph=True) if compile else forward
    leaves = [x.detach().requires_grad_() for x in example.inputs]

    def step() -> list[Tensor]:
        with torch.enable_grad():
            out = run(*leaves)
        return [out, *torch.autograd.grad(out, leaves, example.grad)]

    _verify(step(), example)
    _verify_window(run, example)
    return time_best(step, device, tries=3, repeat=5)


def _verify(results: list[Tensor], example: Example) -> None:
    for name, actual, expected in zip(("output", "grad q", "grad k", "grad v"), results, example.expected):
        if actual.dtype != example.grad.dtype or actual.shape[:2] != example.grad.shape[:2]:
            raise ValueError(f"its {name} is {actual.dtype} {tuple(actual.shape)}")
        error = torch.linalg.vector_norm(actual[:1, :, : expected.shape[2]].float() - expected, dim=(0, 2, 3))
        size = torch.linalg.vector_norm(expected, dim=(0, 2, 3))
        distance = (error / size.clamp_min(size.mean())).mean().item()
        if not distance <= TOLERANCE:  # true for NaN
            raise ValueError(f"its {name} differs from the reference by {distance:.1%}")


def _verify_window(run: Callable[[Tensor, Tensor, Tensor], Tensor], example: Example) -> None:
    """Raise ValueError if the last query does not see exactly the keys of its window."""
    last = example.grad.shape[1] - 1
    first = max(last - example.window, 0)
    marks = torch.zeros_like(example.inputs[2])
    marks[:, first, :, 0] = 1
    if first > 0:
        marks[:, first - 1, :, 1] = 1
    marks[:, last, :, 2] = 1
    q, k, v = (x.detach().requires_grad_() for x in (*example.inputs[:2], marks))  # or it would compile once more
    with torch.enable_grad():
        seen = (run(q, k, v)[0] > 0).all(1)  # (T, H): whether every head saw the mark
    if not (seen[last, 0] and not seen[last, 1] and seen[last, 2] and not seen[last - 1, 2]):
        raise ValueError("its window is wrong")
