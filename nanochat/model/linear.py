"""Matrix products of the model, one signature for every precision: `Linear = (x, weight) -> y`.

Weights are (out, in) masters in float32; a `Linear` decides the precision of the product. Swapping the argument
swaps the precision, so a model trained in one is evaluated in another without touching a module.

`Matmuls` holds the three products of a layer one by one, for custom backwards that make their own gradient.
Letters: R rows (tokens), C width of the input, O width of the output.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]

FP8_MULTIPLE = 16  # fp8 kernels want every side a multiple of it
FP8_MIN_SIDE = 128  # below it, quantising costs more than the product gains
SMALLEST_MAX = 1e-30  # keeps the scale of an all-zero tensor finite, far below any gradient


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in the dtype of `x`.

    Args:
        x: (..., in), any floating dtype.
        weight: (out, in), cast to the dtype of `x`.

    Returns:
        (..., out), dtype of `x`.
    """
    return F.linear(x, weight.to(x.dtype))


def fp8(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T with both sides in float8 and one scale a tensor, taken from its largest value.

    Inputs and weights are e4m3, the incoming gradient e5m2; accumulation is fast (less than float32) in the forward
    only. The gradients are those of the quantised product, passed straight through the rounding:

        grad_x = q5(grad_y) @ q4(weight),  grad_weight = q5(grad_y).T @ q4(x)

    It has a custom backward: for torch.autograd.grad, not for torch.func. What `fp8_fits` refuses is `dense`.

    Args:
        x: (..., in) float32, bfloat16 or float16. weight: (out, in).

    Returns:
        (..., out), dtype of `x`; NaN throughout where `x` or `weight` has a value that is not finite.

    Source: FP8 Formats for Deep Learning (arXiv 2209.05433).
    """
    return _fp8(x, weight, "native")


def fp8_emulated(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `fp8` does up to rounding, where no hardware multiplies float8: quantised, then float32 products."""
    return _fp8(x, weight, "emulated")


def choose(name: Literal["dense", "fp8"], device: torch.device) -> tuple[Linear, str]:
    """Return (linear, what it is in words) for a device.

    Raises:
        ValueError: unknown name.
    """
    if name == "dense":
        return dense, "dense"
    if name != "fp8":
        raise ValueError(f"linear={name}: expected dense or fp8")
    if fp8_support(device) == "native":
        return fp8, "fp8"
    return fp8_emulated, f"fp8 emulated in float32 (slow: this {device.type} device multiplies no float8)"


def fp8_support(device: torch.device) -> Literal["native", "emulated"]:
    """Return "native" where the hardware multiplies float8, seen by a small product with its gradient's dtypes."""
    if device.type != "cuda":
        return "emulated"  # the CPU takes the call as well, by way of float32
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=generator).to(device) for n in (64, 128))
    for dtype, fast in ((torch.float8_e4m3fn, True), (torch.float8_e5m2, False)):
        a, b = quantise(x, dtype), quantise(weight, torch.float8_e4m3fn)
        try:
            got = _multiply(a, b, torch.bfloat16, fast=fast, how="native")
        except (RuntimeError, ValueError):  # what torch raises where the chip or the driver is too old
            return "emulated"
        want = _multiply(a, b, torch.float32, fast=False, how="emulated")
        if not torch.allclose(got.float(), want, atol=0.02 * want.abs().max().item(), rtol=0):
            return "emulated"
    return "native"


def fp8_fits(rows: int, weight: Tensor) -> bool:
    """Return whether the product of (rows, in) with (out, in) is done in fp8: by the sides' multiples and sizes."""
    sides = (rows, *weight.shape)
    return rows > 0 and all(side % FP8_MULTIPLE == 0 for side in sides) and min(weight.shape) >= FP8_MIN_SIDE


class Float8(NamedTuple):
    """A quantised matrix: its values are `values` times the 0-d float32 `scale`."""

    values: Tensor
    scale: Tensor


def quantise(x: Tensor, dtype: torch.dtype) -> Float8:
    """Return `x` in float8, row-major, scaled so that its largest magnitude is the largest of `dtype`.

    The scale stays on the device. One value that is not finite makes the scale so, and with it the whole product.
    """
    largest = x.abs().amax().float()
    factor = torch.finfo(dtype).max / largest.clamp_min(SMALLEST_MAX)
    # No clamp: the largest value lands on the format's largest within an ulp of float32, and rounds to it.
    return Float8((x.float() * factor).to(dtype).contiguous(), factor.reciprocal())


def _multiply(a: Float8, b: Float8, dtype: torch.dtype, *, fast: bool, how: str) -> Tensor:
    """Return a @ b.T of row-major float8 matrices: the one layout that the hardware has."""
    if how == "native":
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast
        )
    return cast((a.values.float() @ b.values.float().t()) * (a.scale * b.scale), dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`, for custom backwards.

    A forward that ends in a `.to` that changes nothing gets a gradient of zero under torch.compile of torch 2.11.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _transposed(x: Float8) -> Float8:
    return Float8(x.values.t().contiguous(), x.scale)


class Matmuls(NamedTuple):
    """The products of a linear layer, on operands that are made once and used in several.

    Attributes:
        operand: (matrix, dtype of the activations) -> an operand: the matrix in the layer's precision.
        grad_operand: the same for a gradient.
        y: (x_RC, weight_OC, dtype) -> x @ weight.T. All three take operands and return a matrix of that dtype.
        grad_x: (grad_RO, weight_OC, dtype) -> grad @ weight.
        grad_w: (grad_RO, x_RC, dtype) -> grad.T @ x.
    """

    operand: Callable[[Tensor, torch.dtype], Any]
    grad_operand: Callable[[Tensor, torch.dtype], Any]
    y: Callable[[Any, Any, torch.dtype], Tensor]
    grad_x: Callable[[Any, Any, torch.dtype], Tensor]
    grad_w: Callable[[Any, Any, torch.dtype], Tensor]


def matmuls(linear: Linear, rows: int, weight: Tensor) -> Matmuls:
    """Return the products that `linear` consists of for (rows, in) times (out, in).

    Raises:
        ValueError: `linear` is none of this file's.
    """
    if linear not in MATMULS:
        raise ValueError(f"linear {linear}: its products are not known, expected one of nanochat.model.linear")
    return MATMULS[linear] if fp8_fits(rows, weight) else MATMULS[dense]


def _quantised(x: Tensor, _dtype: torch.dtype, *, to: torch.dtype) -> Float8:
    return quantise(x, to)


def _y(x: Float8, weight: Float8, dtype: torch.dtype, *, how: str) -> Tensor:
    return _multiply(x, weight, dtype, fast=True, how=how)


def _grad_x(grad: Float8, weight: Float8, dtype: torch.dtype, *, how: str) -> Tensor:
    return _multiply(grad, _transposed(weight), dtype, fast=False, how=how)


def _grad_w(grad: Float8, x: Float8, dtype: torch.dtype, *, how: str) -> Tensor:
    return _multiply(_transposed(grad), _transposed(x), dtype, fast=False, how=how)


def _fp8_matmuls(how: str) -> Matmuls:
    return Matmuls(
        functools.partial(_quantised, to=torch.float8_e4m3fn),
        functools.partial(_quantised, to=torch.float8_e5m2),
        *(functools.partial(product, how=how) for product in (_y, _grad_x, _grad_w)),
    )


MATMULS: dict[Linear, Matmuls] = {
    dense: Matmuls(
        cast,
        cast,
        lambda x, weight, dtype: cast(x @ weight.t(), dtype),
        lambda grad, weight, dtype: cast(grad @ weight, dtype),
        lambda grad, x, dtype: cast(grad.t() @ x, dtype),
    ),
    fp8: _fp8_matmuls("native"),
    fp8_emulated: _fp8_matmuls("emulated"),
}


def _fp8(x: Tensor, weight: Tensor, how: str) -> Tensor:
    rows = x.shape[:-1].numel()
    if not fp8_fits(rows, weight):
        return dense(x, weight)
    y: Any = _Fp8.apply(x.reshape(rows, x.shape[-1]), weight, how)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Fp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, weight_OC: Tensor, how: str) -> Tensor:
        x, weight = quantise(x_RC, torch.float8_e4m3fn), quantise(weight_OC, torch.float8_e4m3fn)
        ctx.save_for_backward(*x, *weight)
        ctx.how, ctx.dtypes = how, (x_RC.dtype, weight_OC.dtype)
        return _y(x, weight, x_RC.dtype, how=how)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore
        x_values, x_scale, weight_values, weight_scale = ctx.saved_tensors
        x, weight = Float8(x_values, x_scale), Float8(weight_values, weight_scale)
        grad = quantise(grad_RO, torch.float8_e5m2)
        return _grad_x(grad, weight, ctx.dtypes[0], how=ctx.how), _grad_w(grad, x, ctx.dtypes[1], how=ctx.how), None
