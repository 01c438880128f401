"""Matrix products, one signature for every precision: `Linear = (x, weight) -> x @ weight.T`.

Weights are (out, in) float32 masters. The precision is an argument, so a model trained in one can be evaluated in
another. `Matmuls` holds the three products of a layer one by one, for custom backwards that make their own gradient.
Letters: R rows (tokens), C input width, O output width.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]

FP8_MULTIPLE = 16  # fp8 kernels want every side to be a multiple of it
FP8_MIN_SIDE = 128  # below it, quantizing costs more than the product gains
MIN_AMAX = 1e-30  # keeps the scale of an all-zero tensor finite, far below any gradient


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in the dtype of `x`."""
    return F.linear(x, weight.to(x.dtype))


def fp8(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T with both operands in float8 and one scale per tensor, from its largest magnitude.

    Inputs and weights are e4m3, the incoming gradient e5m2; accumulation is fast (below float32) in the forward only.
    Gradients are those of the quantized product, passed straight through the rounding:

        grad_x = q5(grad_y) @ q4(weight),  grad_weight = q5(grad_y).T @ q4(x)

    Shapes that `fp8_fits` refuses use `dense`. The result is all NaN if `x` or `weight` is not finite somewhere.

    Source: FP8 Formats for Deep Learning (arXiv 2209.05433).
    """
    return _fp8(x, weight, "fp8")


def fp8_emulated(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `fp8` does, up to rounding, on any device: quantized operands in float32 products."""
    return _fp8(x, weight, "fp8_emulated")


def choose(name: Literal["dense", "fp8"], device: torch.device) -> tuple[Linear, str]:
    """Return (linear, description) for a device."""
    if name == "dense":
        return dense, "dense"
    if name != "fp8":
        raise ValueError(f"linear={name}: expected dense or fp8")
    if fp8_support(device) == "native":
        return fp8, "fp8"
    return fp8_emulated, f"fp8 emulated in float32 (slow: this {device.type} device has no float8 products)"


def fp8_support(device: torch.device) -> Literal["native", "emulated"]:
    """Return "native" if a small product with the gradient's dtypes runs on the device and is right."""
    if device.type != "cuda":
        return "emulated"  # the CPU takes the call too, by way of float32
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=generator).to(device) for n in (64, 128))
    for dtype, fast in ((torch.float8_e4m3fn, True), (torch.float8_e5m2, False)):
        a, b = quantize(x, dtype), quantize(weight, torch.float8_e4m3fn)
        try:
            actual = _multiply(a, b, torch.bfloat16, fast=fast, mode="native")
        except (RuntimeError, ValueError):  # the GPU or the driver is too old
            return "emulated"
        expected = _multiply(a, b, torch.float32, fast=False, mode="emulated")
        if not torch.allclose(actual.float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0):
            return "emulated"
    return "native"


def fp8_fits(rows: int, weight: Tensor) -> bool:
    """Return whether (rows, in) times (out, in) is worth computing in fp8."""
    sides = (rows, *weight.shape)
    return rows > 0 and all(side % FP8_MULTIPLE == 0 for side in sides) and min(weight.shape) >= FP8_MIN_SIDE


class Float8(NamedTuple):
    """A quantized matrix: `values` times the 0-d float32 `scale`."""

    values: Tensor
    scale: Tensor


def quantize(x: Tensor, dtype: torch.dtype) -> Float8:
    """Return `x` in float8, row-major, scaled so that its largest magnitude is the largest of `dtype`.

    The scale stays on the device. A non-finite value makes it, and so the product, non-finite.
    """
    amax = x.abs().amax().float()
    factor = torch.finfo(dtype).max / amax.clamp_min(MIN_AMAX)
    # No clamp: the largest value lands within a float32 ulp of the format's largest, and rounds to it.
    return Float8((x.float() * factor).to(dtype).contiguous(), factor.reciprocal())


def _stored(x: Float8) -> Float8:
    """Return `x` as a view that makes Inductor store it once; else it writes a copy for each product that reads it."""
    return Float8(x.values.as_strided(x.values.shape, x.values.stride()), x.scale)


def _multiply(a: Float8, b: Float8, dtype: torch.dtype, *, fast: bool, mode: str) -> Tensor:
    """Return a @ b.T of row-major float8 matrices, the only layout the hardware supports."""
    if mode == "native":
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast
        )
    return cast((a.values.float() @ b.values.float().t()) * (a.scale * b.scale), dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`, for custom backwards.

    In torch 2.11, a forward that ends in a no-op `.to` gets a zero gradient under torch.compile.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _transpose(x: Float8) -> Float8:
    return Float8(x.values.t().contiguous(), x.scale)


class Matmuls(NamedTuple):
    """The three products of a linear layer, on operands that are made once and used in several."""

    operand: Callable[[Tensor, torch.dtype], Any]  # (matrix, dtype of the activations) -> it in the layer's precision
    grad_operand: Callable[[Tensor, torch.dtype], Any]  # the same for a gradient
    y: Callable[[Any, Any, torch.dtype], Tensor]  # (x_RC, weight_OC, dtype of the result) -> x @ weight.T
    grad_x: Callable[[Any, Any, torch.dtype], Tensor]  # (grad_RO, weight_OC, dtype) -> grad @ weight
    grad_w: Callable[[Any, Any, torch.dtype], Tensor]  # (grad_RO, x_RC, dtype) -> grad.T @ x


def matmuls(name: str, rows: int, weight: Tensor) -> Matmuls:
    """Return the products of which the linear of this name consists for (rows, in) times (out, in)."""
    if name not in MATMULS:
        raise ValueError(f"linear {name}: its products are unknown, expected one of {', '.join(MATMULS)}")
    return MATMULS[name if fp8_fits(rows, weight) else "dense"]


def _fp8_matmuls(mode: str) -> Matmuls:
    return Matmuls(
        lambda x, _: _stored(quantize(x, torch.float8_e4m3fn)),
        lambda grad, _: quantize(grad, torch.float8_e5m2),
        lambda x, weight, dtype: _multiply(x, weight, dtype, fast=True, mode=mode),
        lambda grad, weight, dtype: _multiply(grad, _stored(_transpose(weight)), dtype, fast=False, mode=mode),
        lambda grad, x, dtype: _multiply(_transpose(grad), _transpose(x), dtype, fast=False, mode=mode),
    )


MATMULS = {
    "dense": Matmuls(
        cast,
        cast,
        lambda x, weight, dtype: cast(x @ weight.t(), dtype),
        lambda grad, weight, dtype: cast(grad @ weight, dtype),
        lambda grad, x, dtype: cast(grad.t() @ x, dtype),
    ),
    "fp8": _fp8_matmuls("native"),
    "fp8_emulated": _fp8_matmuls("emulated"),
}


def _fp8(x: Tensor, weight: Tensor, name: str) -> Tensor:
    rows = x.shape[:-1].numel()
    if not fp8_fits(rows, weight):
        return dense(x, weight)
    return _fp8_product(x.reshape(rows, x.shape[-1]), weight, name).view(*x.shape[:-1], weight.shape[0])


# Dynamo must not look inside: it would trace the forward and let torch.func derive another backward from that.
@torch.compiler.allow_in_graph
def _fp8_product(x_RC: Tensor, weight_OC: Tensor, name: str) -> Tensor:
    return _Fp8.apply(x_RC, weight_OC, name)[0]  # pyright: ignore


class _Fp8(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_RC: Tensor, weight_OC: Tensor, name: str) -> tuple[Tensor, ...]:
        products = MATMULS[name]
        x, weight = products.operand(x_RC, x_RC.dtype), products.operand(weight_OC, x_RC.dtype)
        return products.y(x, weight, x_RC.dtype), *x, *weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, ...]) -> None:
        x_RC, weight_OC, ctx.name = inputs
        ctx.dtypes = x_RC.dtype, weight_OC.dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore
        x_values, x_scale, weight_values, weight_scale = ctx.saved_tensors
        x, weight = Float8(x_values, x_scale), Float8(weight_values, weight_scale)
        products, (x_dtype, weight_dtype) = MATMULS[ctx.name], ctx.dtypes
        grad = products.grad_operand(grad_RO, x_dtype)
        return products.grad_x(grad, weight, x_dtype), products.grad_w(grad, x, weight_dtype), None
