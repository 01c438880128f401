"""Every attention kernel against the plain one, and the plain one against its definition."""

import math
import re
import sys
import time
import types
from typing import Any

import pytest
import torch
from small_model import LargestTensor
from torch import Tensor

from nanochat.model import attention

HEADS = [(2, 2), (4, 2), (3, 1)]  # query heads, key/value heads
# T and the window: no multiple, T = w, w + 1, w + 2, 2w, 2w + 1, w over T, own key only, one token, several blocks.
SHAPES = [(10, 3), (3, 3), (4, 3), (5, 3), (6, 3), (7, 3), (5, 8), (5, 0), (6, 1), (1, 0), (1, 4), (40, 7)]


QKV = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def nothing_tried_before() -> None:
    attention.choose.cache_clear()


def qkv(
    n_time: int, heads: tuple[int, int], width: int = 8, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> QKV:
    generator = torch.Generator().manual_seed(n_time)

    def draw(n: int) -> Tensor:
        return torch.randn(2, n_time, n, width, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw(heads[0]), draw(heads[1]), draw(heads[1])


def with_grads(attend: attention.Attend, inputs: QKV, window: int) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(leaves[0], leaves[1], leaves[2], window)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weight.to(out.device)).sum(), leaves)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 2, 9])
def test_math_equals_a_loop_over_queries(heads: tuple[int, int], window: int):
    q, k, v = qkv(6, heads)
    out = attention.math(q, k, v, window)
    for b in range(2):
        for i in range(6):
            for n in range(heads[0]):
                kv = n // (heads[0] // heads[1])
                seen = slice(max(i - window, 0), i + 1)
                scores = (k[b, seen, kv] @ q[b, i, n] / math.sqrt(8)).exp()
                torch.testing.assert_close(out[b, i, n], scores @ v[b, seen, kv] / scores.sum())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("n_time, window", SHAPES)
def test_sdpa_equals_math_with_gradients(n_time: int, window: int, heads: tuple[int, int]):
    inputs = qkv(n_time, heads)
    for got, want in zip(with_grads(attention.sdpa, inputs, window), with_grads(attention.math, inputs, window)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_short_window_needs_no_quadratic_memory():
    n_time, window, n_head = 1024, 32, 2
    inputs = qkv(n_time, (n_head, 1), dtype=torch.float32)
    sizes = {}
    for attend in (attention.math, attention.sdpa):
        with LargestTensor() as largest:
            with_grads(attend, inputs, window)
        sizes[attend] = largest.numel
    assert sizes[attention.math] >= 2 * n_head * n_time**2  # the probe sees the square where there is one
    assert sizes[attention.sdpa] <= 2 * n_head * n_time * 2 * window


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_sdpa_under_vmap_equals_a_loop():
    qs, ks, vs = (torch.stack([x, 2 * x, -x]) for x in qkv(10, (4, 2)))
    got = torch.func.vmap(attention.sdpa, in_dims=(0, 0, 0, None))(qs, ks, vs, 3)
    want = torch.stack([attention.sdpa(q, k, v, 3) for q, k, v in zip(qs, ks, vs)])
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 1, 5, 16, 39, 40])
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_kernels_for_gpus_before_ampere_see_the_keys_of_the_mask(kernel: str, window: int):
    """In float16, which such GPUs compute in; value j marks key j."""
    n_time = 40
    attend = attention.build({window: kernel}, n_time, CPU)
    q, k, _ = qkv(n_time, (2, 1), width=n_time, dtype=torch.float16)
    seen = attend(q[:1] / 8, k[:1] / 8, torch.eye(n_time, dtype=torch.float16)[None, :, None], window) > 0
    assert torch.equal(seen[0].transpose(0, 1), attention.mask(n_time, window).expand(2, -1, -1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("n_time", [256, 200])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_flex_forward_equals_math(n_time: int, heads: tuple[int, int]):
    inputs = qkv(n_time, heads, width=16, dtype=torch.float32)
    windows = (0, 3, 128, 130, n_time)
    flex = attention.make_flex(n_time, windows, "cpu")
    for window in windows:
        torch.testing.assert_close(flex(*inputs, window), attention.math(*inputs, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [100, 256])
def test_flash_traces_forward_and_backward(window: int):
    """Its kernel is CUDA's; on the meta device the shapes, the tracing and the backward are seen."""
    q, k, v = (torch.empty(2, 256, n, 64, device="meta", dtype=torch.bfloat16).requires_grad_() for n in (4, 2, 2))
    torch._dynamo.reset()
    for run in (attention.flash, torch.compile(attention.flash, fullgraph=True, backend="aot_eager")):
        out = run(q, k, v, window)
        grads = torch.autograd.grad(out.sum(), [q, k, v])
        assert [t.shape for t in (out, *grads)] == [q.shape, q.shape, k.shape, v.shape]


# --- choosing -------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def choose(kernel: str, windows: tuple[int, ...] = (4, 16), **options: Any) -> attention.KernelChoice:
    return attention.choose(kernel, 16, windows, (4, 2, 8), CPU, torch.float32, **options)


def fastest(monkeypatch: pytest.MonkeyPatch, *candidates: str) -> attention.KernelChoice:
    monkeypatch.setitem(attention.CANDIDATES, "fa3", candidates)
    attention.choose.cache_clear()
    return choose("fa3", compile=False)


def test_choose_on_cpu():
    assert choose("auto") == ({4: "sdpa", 16: "sdpa"}, "sdpa")
    assert choose("sdpa", (16, 4, 16)) == ({4: "sdpa", 16: "sdpa"}, "sdpa")
    assert choose("math", (16,)) == ({16: "math"}, "math")


def test_build_uses_the_chosen_kernel_per_window():
    assert attention.build({4: "sdpa", 16: "sdpa"}, 16, CPU) is attention.sdpa
    inputs = qkv(16, (4, 2))
    attend = attention.build({4: "math", 16: "sdpa"}, 16, CPU)
    assert torch.equal(attend(*inputs, 4), attention.math(*inputs, 4)), "bit for bit"
    assert torch.equal(attend(*inputs, 16), attention.sdpa(*inputs, 16))


@pytest.mark.parametrize(
    "kernel, why",
    [
        ("flex", "flex: .*FlexAttention does not support backward on CPU"),
        ("cudnn", "cudnn: .*cuDNN has no sliding window"),
        ("flash", "flash: NotImplementedError"),
        ("fa2", "fa2: ModuleNotFoundError: No module named 'flash_attn'"),
        ("fa3", "fa3: ModuleNotFoundError.*; fa3_hub: ModuleNotFoundError.*; fa3_torch: ModuleNotFoundError"),
    ],
)
def test_choose_refuses_kernels_that_do_not_run_here(kernel: str, why: str):
    wanted = rf"attention={kernel} does not work on this cpu device \({why}.*\); set attention=sdpa"
    with pytest.raises(ValueError, match=wanted):
        choose(kernel, compile=True)


def test_choose_refuses_unknown_kernels_and_uncompiled_flex():
    with pytest.raises(ValueError, match="attention=paged: expected auto, math, sdpa, flex, cudnn, flash, fa2, fa3"):
        choose("paged")
    with pytest.raises(ValueError, match="attention=flex needs compile=true"):
        choose("flex", compile=False)


def package(attend: Any) -> Any:
    """Return a module with a flash_attn_func of the packages' signature, computed by `attend(q, k, v, window)`."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> Any:
        assert causal and window_size in ((3, 0), (4, 0), (-1, 0))
        return attend(q, k, v, window_size[0] if window_size[0] >= 0 else q.shape[1])

    return types.SimpleNamespace(flash_attn_func=flash_attn_func)


def test_external_flash_gets_its_own_window_convention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package(attention.math))
    names = choose("fa3", compile=False).names
    assert names == {4: "fa3", 16: "fa3"}
    inputs, attend = qkv(16, (4, 2)), attention.build(names, 16, CPU)
    for window in (4, 16):
        assert torch.equal(attend(*inputs, window), attention.math(*inputs, window))


def test_external_flash_compiles_and_may_return_a_tuple(monkeypatch: pytest.MonkeyPatch):
    early = package(lambda q, k, v, window: (attention.math(q, k, v, window), torch.zeros(())))
    monkeypatch.setitem(sys.modules, "flash_attn", early)
    attend, inputs = attention.build({3: "fa2"}, 10, CPU), qkv(10, (4, 2))
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, want in zip(with_grads(compiled, inputs, 3), with_grads(attention.math, inputs, 3)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "get_kernel", [lambda repo_id, *, version: package(attention.math), lambda repo_id: package(attention.math)]
)
def test_hub_kernel_with_and_without_version(monkeypatch: pytest.MonkeyPatch, get_kernel: Any):
    module = types.SimpleNamespace(get_kernel=get_kernel)
    monkeypatch.setitem(sys.modules, "kernels", module)  # pyright: ignore[reportArgumentType]
    assert choose("fa3", compile=False).names == {4: "fa3_hub", 16: "fa3_hub"}


def broken(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


WRONG = {
    "numbers": (lambda q, k, v, w: 1.05 * attention.math(q, k, v, w), r"its output differs from the reference by 4"),
    "nan": (lambda q, k, v, w: attention.math(q, k, v, w) * math.nan, "differs from the reference by nan%"),
    "gradient": (lambda q, k, v, w: attention.math(q.detach() + 0 * q, k, v, w), "its grad q differs"),
    "no gradient": (lambda q, k, v, w: attention.math(q, k, v, w).detach(), "does not require grad"),
    "dtype": (lambda q, k, v, w: attention.math(q, k, v, w).double(), "its output is torch.float64"),
    "groups": (lambda q, k, v, w: attention.math(q, k.roll(1, 2), v.roll(1, 2), w), "its output differs"),
    "raises": (broken, "RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernel_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str):
    attend, why = WRONG[name]
    monkeypatch.setitem(attention.KERNELS, "fa3", lambda *_: attend)
    with pytest.raises(ValueError, match=why):
        fastest(monkeypatch, "fa3")
    assert fastest(monkeypatch, "fa3", "sdpa").names == {4: "sdpa", 16: "sdpa"}


@pytest.mark.parametrize("by", [-1, 1])
def test_window_off_by_one_is_detected_at_any_length(monkeypatch: pytest.MonkeyPatch, by: int):
    """In half precision, and where one key of 300 changes the numbers by less than they are rounded."""
    monkeypatch.setitem(attention.KERNELS, "fa3", lambda *_: lambda q, k, v, w: attention.sdpa(q, k, v, w + by))
    shape = (320, 300, (1, 1, 16), CPU, torch.bfloat16, 1)
    sample = attention.make_example(*shape)
    attention.benchmark_and_verify("sdpa", sample, compile=False)
    with pytest.raises(ValueError, match=r"differs from the reference|its window is wrong"):
        attention.benchmark_and_verify("fa3", sample, compile=False)
    monkeypatch.setattr(attention, "TOLERANCE", math.inf)
    with pytest.raises(ValueError, match="its window is wrong"):
        attention.benchmark_and_verify("fa3", sample, compile=False)


def test_fastest_kernel_is_chosen_per_window(monkeypatch: pytest.MonkeyPatch):
    def slow_at(slow: int) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            time.sleep(0.03 if window == slow else 0)
            return attention.math(q, k, v, window)

        return lambda *_: attend

    monkeypatch.setitem(attention.KERNELS, "fa2", slow_at(4))
    monkeypatch.setitem(attention.KERNELS, "fa3", slow_at(16))
    choice = fastest(monkeypatch, "fa2", "fa3")
    assert choice.names == {4: "fa3", 16: "fa2"}
    number = r"\d+\.\d\d"
    assert re.fullmatch(
        rf"window 4: fa3 {number} ms \(fa2 {number}\); window 16: fa2 {number} ms \(fa3 {number}\)", choice.text
    )


def test_kernels_that_are_not_here_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    text = fastest(monkeypatch, "sdpa", "fa3").text
    assert re.search(r"; no fa3: ModuleNotFoundError: No module named 'flash_attn_interface'$", text)


def test_torch_fa3_replaces_flash_only_when_built(monkeypatch: pytest.MonkeyPatch):
    active = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda **_: active.clear())
    monkeypatch.setattr(attention, "flash", attention.math)
    choice = fastest(monkeypatch, "flash", "fa3_torch")
    assert active == []
    attention.build({4: "fa3_torch", 16: "sdpa"}, 16, CPU)
    assert active == ["FA3"]
    assert set(choice.names.values()) <= {"flash", "fa3_torch"}


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [name for name in attention.KERNELS if name != "math"])
@pytest.mark.parametrize(("heads", "windows"), [((4, 4), (200,)), ((4, 2), (128, 640))])
def test_kernels_on_cuda_in_bfloat16_with_gradients(kernel: str, heads: tuple[int, int], windows: tuple[int, ...]):
    n_time, device = 640, torch.device("cuda")
    windows = (640,) if kernel == "cudnn" else windows
    try:
        choice = attention.choose(kernel, n_time, windows, (*heads, 64), device, torch.bfloat16)
    except ValueError as error:
        hopper = torch.cuda.get_device_capability() >= (9, 0)
        if kernel in ("sdpa", "flex", *(("flash", "cudnn") if hopper else ())):
            raise
        pytest.skip(str(error))
    attend = attention.build(choice.names, n_time, device)
    inputs = qkv(n_time, heads, width=64, dtype=torch.bfloat16, device="cuda")
    q, k, v = inputs
    for window in windows:
        want = with_grads(attention.math, (q.float(), k.float(), v.float()), window)
        torch._dynamo.reset()  # one compilation a window: inside the model a window is a constant
        run = torch.compile(lambda q, k, v, w: attend(q, k, v, w), fullgraph=True)
        for got, expected in zip(with_grads(run, inputs, window), want):
            assert (got.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.gpu
def test_auto_on_cuda_chooses_a_kernel_that_skips_hidden_keys():
    device, heads = torch.device("cuda"), (6, 6, 128)
    start = time.perf_counter()
    choice = attention.choose("auto", 2048, (512, 2048), heads, device, torch.bfloat16, rows=16)
    print(f"{choice.text}; chosen in {time.perf_counter() - start:.0f} s")
    assert choice.names.keys() == {512, 2048}
    assert choice.names[512] not in ("math", "cudnn")
    assert all(name in choice.text for name in ("sdpa", "flex")), "a kernel is off at a shape of training"
