"""fp8: its numbers and gradients against the formulas, what it refuses, and what it keeps."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.model import Linear, dense, fp8, fp8_emulated, linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BOTH = [fp8, fp8_emulated]  # torch's CPU multiplies float8 as well, slowly: the native path runs here too
COMPILED: dict[Linear, torch.dtype] = {fp8: torch.bfloat16, fp8_emulated: torch.float32}  # by Inductor, once
CUDA = torch.device("cuda")


def inputs(rows: int = 48, c: int = 128, o: int = 144, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return x, weight and the gradient of the product, each with its own range."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(n, m, generator=generator) for n, m in ((rows, c), (o, c), (rows, o)))
    return x.to(dtype), 0.03 * weight, (1e-5 * grad.exp()).to(dtype)


def with_grads(f: Any, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantise by looking up the nearest of the format's values, in float64; ties take the even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).double()
    values, codes = values[values.isfinite()], codes[values.isfinite()]
    order = values.argsort(stable=True)
    values, codes = values[order], codes[order]
    scale = values.max() / x.abs().max().double()
    scaled = (x.float() * scale.float()).double().clamp(values.min(), values.max())
    above = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    tie_to_low = (codes[above - 1] % 2) == 0
    nearer_low = (scaled - low < high - scaled) | ((scaled - low == high - scaled) & tie_to_low)
    return torch.where(nearer_low, low, high) / scale


def formulas(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The product and its straight-through gradients in float64, from operands rounded as above."""
    x8, weight8, grad8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(grad, E5M2)
    return [x8 @ weight8.T, grad8 @ weight8, grad8.T @ x8]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("y", "grad x", "grad weight"), got, want):
        distance = (a.double() - b.double()).norm() / b.double().norm()
        assert distance < tolerance, f"{name}: {distance:.1e}"


@functools.cache
def compiled(f: Linear, backend: str = "inductor") -> Any:
    return torch.compile(f, fullgraph=True, backend=backend)


@pytest.mark.parametrize("f", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_fp8_eager_and_compiled_equal_the_formulas(f: Linear, dtype: torch.dtype):
    given, backend = inputs(dtype=dtype), "inductor" if dtype == COMPILED[f] else "aot_eager"
    want = formulas(*given)
    for run in (f, compiled(f, backend)):
        got = with_grads(run, *given)
        assert [t.dtype for t in got] == [dtype, dtype, torch.float32]
        # Within float32's rounding of the sums; bfloat16 rounds the result, and inductor its input once less.
        assert_close(got, want, 1e-6 if dtype == torch.float32 else 3e-3)
    exact = with_grads(dense, *given)
    for a, b in zip(want, exact):
        assert 0.01 < (a - b).norm() / b.norm() < 0.1, "fp8 should be seen to differ, and not by much"


@pytest.mark.parametrize("f", BOTH)
def test_fp8_accepts_any_leading_dimensions_and_strides(f: Linear):
    x, weight, grad = inputs()
    flat = with_grads(f, x, weight, grad)
    batched = with_grads(f, x.view(2, 24, 128), weight, grad.view(2, 24, 144))
    assert batched[0].shape == (2, 24, 144) and batched[1].shape == (2, 24, 128)
    for a, b in zip(flat, batched):
        assert torch.equal(a, b.view(a.shape))
    strided = with_grads(f, x.T.contiguous().T, weight.T.contiguous().T, grad.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(flat, strided))


@pytest.mark.parametrize(
    "rows, c, o", [(17, 128, 128), (16, 136, 128), (16, 128, 136), (16, 112, 256), (16, 256, 112), (0, 128, 128)]
)
def test_fp8_falls_back_to_dense_for_other_sizes(rows: int, c: int, o: int):
    given = inputs(rows, c, o)
    assert linear.matmuls("fp8", rows, given[1]) is linear.MATMULS["dense"]
    assert all(torch.equal(a, b) for a, b in zip(with_grads(fp8, *given), with_grads(dense, *given)))


@pytest.mark.parametrize("f", BOTH)
def test_fp8_of_zeros_is_zero(f: Linear):
    x, weight, grad = inputs(dtype=COMPILED[f])
    for run in (f, compiled(f)):
        for given in ((0 * x, weight, grad), (x, 0 * weight, grad), (x, weight, 0 * grad), (0 * x, weight, 0 * grad)):
            for got, want in zip(with_grads(run, *given), with_grads(dense, *given)):
                assert got.isfinite().all()
                assert got.any() == want.any()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("f", BOTH)
def test_fp8_propagates_nonfinite_values(f: Linear, bad: float, compile: bool):
    run = compiled(f) if compile else f
    for place in range(3):
        given = [t.clone() for t in inputs(dtype=COMPILED[f])]
        given[place][3, 5] = bad
        y, grad_x, grad_weight = with_grads(run, *given)
        assert y.isfinite().all() == (place == 2)
        assert grad_x.isfinite().all() == (place == 0)
        assert grad_weight.isfinite().all() == (place == 1)


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_fp8_scale_follows_the_tensor(scale: float):
    x, weight, grad = inputs()
    y, grad_x, grad_weight = with_grads(fp8_emulated, x * scale, weight / scale, grad)
    want = with_grads(fp8_emulated, x, weight, grad)
    assert_close([y, grad_x * scale, grad_weight / scale], want, 1e-2)


@pytest.mark.parametrize("f", BOTH)
def test_fp8_saves_eight_bits_for_the_backward(f: Linear):
    x, weight, _ = inputs(dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        f(x.requires_grad_(), weight.requires_grad_())
    assert sum(t.nbytes for t in kept) == x.numel() + weight.numel() + 2 * 4


@pytest.mark.parametrize("compile", [False, True])
def test_torch_func_uses_the_backward_of_fp8(compile: bool):
    x, weight, grad = inputs()

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return (fp8_emulated(x, weight) * grad).sum()

    of_func: Any = torch.func.grad(f, argnums=(0, 1))
    of_func = torch.compile(of_func, fullgraph=True, backend="aot_eager") if compile else of_func
    got, want = of_func(x, weight), with_grads(fp8_emulated, x, weight, grad)[1:]
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    members = torch.func.vmap(f)(torch.stack([x, 2 * x]), torch.stack([weight, 3 * weight]))
    torch.testing.assert_close(members, torch.stack([f(x, weight), f(2 * x, 3 * weight)]))


def test_choose_describes_the_linear(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert linear.choose("dense", cpu) == (dense, "dense")
    assert linear.fp8_support(cpu) == "emulated"
    f, text = linear.choose("fp8", cpu)
    assert f is fp8_emulated and text == "fp8 emulated in float32 (slow: this cpu device has no float8 products)"
    monkeypatch.setattr(linear, "fp8_support", lambda device: "native")
    assert linear.choose("fp8", cpu) == (fp8, "fp8")
    with pytest.raises(ValueError, match="linear=int4: expected dense or fp8"):
        linear.choose("int4", cpu)  # pyright: ignore[reportArgumentType]


def test_fp8_support_runs_a_product_and_compares(monkeypatch: pytest.MonkeyPatch):
    class Device:  # looks like a GPU, is the CPU
        type = "cuda"

    real_to, multiply = Tensor.to, linear._multiply
    monkeypatch.setattr(Tensor, "to", lambda x, *a, **k: x if isinstance(a[0], Device) else real_to(x, *a, **k))
    assert linear.fp8_support(Device()) == "native"  # pyright: ignore[reportArgumentType]

    def wrong(*args: Any, mode: str, **kwargs: Any) -> Tensor:
        return multiply(*args, mode=mode, **kwargs) * (1.1 if mode == "native" else 1)

    def fails(*args: Any, mode: str, **kwargs: Any) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0")

    for broken in (wrong, fails):
        monkeypatch.setattr(linear, "_multiply", broken)
        assert linear.fp8_support(Device()) == "emulated"  # pyright: ignore[reportArgumentType]


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_fp8_on_cuda_equals_the_formulas(dtype: torch.dtype):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products before Ada and Hopper")
    assert linear.choose("fp8", CUDA) == (fp8, "fp8")
    given = inputs(256, 512, 384, dtype)
    want = formulas(*given)
    on_gpu = [t.cuda() for t in given]
    torch._dynamo.reset()
    for run in (fp8, torch.compile(fp8, fullgraph=True), fp8_emulated):
        got = [t.cpu() for t in with_grads(run, *on_gpu)]
        # Fast accumulation rounds partial sums of the forward to about 14 bits.
        assert_close(got[:1], want[:1], 3e-3)
        assert_close(got[1:], want[1:], 3e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
def test_fp8_on_cuda_never_waits_for_the_device():
    given = [t.cuda() for t in inputs(256, 512, 384, torch.bfloat16)]
    f, _ = linear.choose("fp8", CUDA)
    run = torch.compile(f, fullgraph=True)
    with_grads(run, *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_grads(run, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
