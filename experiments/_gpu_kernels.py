"""Kernels on a GPU, for bench_gpu: attention and the products of linear layers, beside the roofline."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from experiments import _bench
from experiments._gpu_bench import Bench, shape_of
from nanochat.model import attention, linear

# Attention runs at less than a large product: what FlashAttention-3 reports of a Hopper chip, forward and backward.
ATTENTION_SHARE = 0.65


def attention_kernels(bench: Bench) -> None:
    """Time every attention kernel forward and backward, per window and number of heads, beside the roofline."""
    config, device, dtype = bench.config, bench.here.device, bench.here.compute_dtype
    time_, tokens = config.sequence_len, 2**16 if bench.cuda else config.sequence_len
    missing: set[tuple[str, int]] = set()
    for depth in config.depths:
        shape = shape_of(config, depth)
        for window in sorted(set(shape.windows)):
            size = (tokens // time_, time_, shape.n_head, shape.head_dim)
            inputs = [torch.randn(size, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
            grad = torch.randn(size, device=device, dtype=dtype)
            w = min(window, time_)
            flops = 14 * shape.n_embd * (w - w**2 / (2 * time_)) * tokens
            floor = flops / bench.limits().matmul
            print(f"  {shape.n_head} heads, window {window}: predicted {1000 * floor / ATTENTION_SHARE:.3f} ms: "
                  f"{ATTENTION_SHARE:.0%} of a matmul's rate", flush=True)  # fmt: skip
            for name in [n for n in attention.KERNELS if n != "math" and (n, window) not in missing]:
                if bench.seconds_left() < 15:
                    print("  no time left for the rest")
                    return
                with kernel(name, window, time_, device, config.compile) as attend:
                    try:
                        seconds, error = time_attention(attend, inputs, grad, window, device)
                    except Exception as problem:  # whatever a package, a compiler or a driver raises: not here
                        missing.add((name, window))  # nor at another number of heads
                        print(f"    {name:10} not here: {type(problem).__name__}: {first_line(problem)}")
                        continue
                speed = flops / seconds
                print(f"    {name:10} {1000 * seconds:8.3f} ms  {speed / 1e12:7.1f} TFLOP/s  error {error:.1e}")
                bench.report(
                    what=name, heads=shape.n_head, window=window, seconds=seconds, flops_per_second=speed,
                    predicted_seconds=floor / ATTENTION_SHARE, error=error,
                )  # fmt: skip


def first_line(error: Exception) -> str:
    """Return what an error says, in short."""
    return (str(error).strip().splitlines() or [""])[0][:120]


@contextlib.contextmanager
def kernel(name: str, window: int, n_time: int, device: torch.device, compile: bool) -> Iterator[Callable[..., Any]]:
    """Give an attention kernel as training uses it, made at its first call; afterwards the process is as before."""

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return made()(*inputs, window)

    @functools.lru_cache(maxsize=1)
    def made() -> Callable[..., Any]:
        found = attention.build({window: name}, n_time, device)
        if not compile or name not in ("sdpa", "flex"):  # the others are one operation
            return found
        torch.compiler.reset()
        return torch.compile(found, fullgraph=True, dynamic=False)

    try:
        yield attend
    finally:
        if name == "fa3_torch" and hasattr(torch.nn.attention, "restore_flash_attention_impl"):
            torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


def time_attention(
    attend: Callable[..., Any], inputs: list[torch.Tensor], grad: torch.Tensor, window: int, device: torch.device
) -> tuple[float, float]:
    """Return seconds of forward and backward, and the error of output and gradients in the first row."""

    def step() -> list[torch.Tensor]:
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    got = [x[:1].detach().float() for x in step()]
    few = [x[:1].detach().float().requires_grad_() for x in inputs]
    plain = attention.math(few[0], few[1], few[2], window)
    want = [plain.detach(), *torch.autograd.grad(plain, few, grad[:1].float())]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, want))
    if not error < 0.02:
        raise ValueError(f"its numbers are off by {error:.1%}")
    return _bench.seconds_of({"step": step}, device)["step"], error


def linear_layers(bench: Bench) -> None:
    """Time the three products of a layer in the compute dtype and in fp8, quantising included."""
    config, device, dtype = bench.config, bench.here.device, bench.here.compute_dtype
    fp8, words = linear.choose("fp8", device)
    print(f"  forward and both gradients; fp8 is {words}")
    sizes: dict[tuple[int, int], int] = {}
    for depth in config.depths[:2]:
        shape = shape_of(config, depth)
        c, tokens = shape.n_embd, 2**16 if bench.cuda else 256
        rows = {(c, c): tokens, (4 * c, c): tokens, (c, 4 * c): tokens, (shape.padded_vocab, c): min(8192, tokens)}
        sizes |= rows  # the loss takes its logits in chunks
    for (out, width), n in sizes.items():
        if bench.seconds_left() < 15:
            print("  no time left for the rest")
            return
        x, grad = (torch.randn(n, side, device=device, dtype=dtype) for side in (width, out))
        weight = torch.randn(out, width, device=device)
        kinds = {"dense": linear.dense, "fp8": fp8}
        fs = {name: three(f, x, weight, grad, config.compile) for name, f in kinds.items()}
        found = _bench.seconds_of(fs, device)
        flops, reached = 6 * n * out * width, bench.limits()
        quantise = (7 * n * (out + width) + 11 * out * width) / reached.copy
        floors = {"dense": flops / reached.matmul, "fp8": flops / (reached.fp8 or reached.matmul) + quantise}
        text = "; ".join(
            f"{name} {1000 * found[name]:.3f} ms, {flops / found[name] / 1e12:.1f} TFLOP/s (predicted "
            f"{1000 * floors[name]:.3f} ms)"
            for name in found
        )
        print(f"  {n} x {width} -> {out}: {text}; fp8 is {found['dense'] / found['fp8']:.2f} x", flush=True)
        bench.report(what="linear", rows=n, inner=width, outer=out, seconds=found, predicted_seconds=floors)


def three(
    f: linear.Linear, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, compile: bool
) -> Callable[[], Any]:
    """Return a function that does the three products of a linear layer, as training would."""
    products = linear.matmuls(f, len(x), weight)

    def step(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        dtype = x.dtype
        a, b, g = products.operand(x, dtype), products.operand(weight, dtype), products.grad_operand(grad, dtype)
        return [products.y(a, b, dtype), products.grad_x(g, b, dtype), products.grad_w(g, a, torch.float32)]

    return functools.partial(torch.compile(step, dynamic=False) if compile else step, x, weight, grad)
