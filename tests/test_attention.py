"""Every attention kernel against the plain one, and the plain one against its definition."""

import math

import pytest
import torch
from small_model import LargestTensor
from torch import Tensor

from nanochat import attention

HEADS = [(2, 2), (4, 2), (3, 1)]  # query heads, key/value heads
# T and the window: no multiple, T = w, w + 1, w + 2, 2w, 2w + 1, w over T, own key only, one token, several blocks.
SHAPES = [(10, 3), (3, 3), (4, 3), (5, 3), (6, 3), (7, 3), (5, 8), (5, 0), (6, 1), (1, 0), (1, 4), (40, 7)]


QKV = tuple[Tensor, Tensor, Tensor]


def qkv(
    n_time: int, heads: tuple[int, int], width: int = 8, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> QKV:
    generator = torch.Generator().manual_seed(n_time)

    def draw(n: int) -> Tensor:
        return torch.randn(2, n_time, n, width, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw(heads[0]), draw(heads[1]), draw(heads[1])


def in_float32(inputs: QKV) -> QKV:
    q, k, v = inputs
    return q.float(), k.float(), v.float()


def with_grads(attend: attention.Attend, inputs: QKV, window: int) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(leaves[0], leaves[1], leaves[2], window)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weight.to(out.device)).sum(), leaves)]


def test_mask_shows_the_key_itself_and_window_keys_before_it():
    seen = attention.mask(5, 2).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 2, 9])
def test_math_is_the_definition_query_by_query(heads: tuple[int, int], window: int):
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


@pytest.mark.parametrize("attend", [attention.math, attention.sdpa])
def test_gradient_reaches_the_window_and_nothing_else(attend: attention.Attend):
    q, k, v = qkv(9, (2, 1))

    def at(values: Tensor) -> Tensor:  # (T,): one number a query
        return attend(q[:1], k[:1], values, 3).sum((0, 2, 3))

    reach = torch.autograd.functional.jacobian(at, v[:1])
    assert isinstance(reach, Tensor)  # (T queries, 1, T keys, 1, H)
    assert torch.equal(reach[:, 0, :, 0].abs().amax(-1) > 0, attention.mask(9, 3))


def test_a_short_window_never_costs_the_square_of_the_sequence():
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


def test_math_keeps_half_precision_and_scores_in_float32():
    inputs = qkv(10, (4, 2), dtype=torch.bfloat16)
    got = attention.math(*inputs, 3)
    assert got.dtype == torch.bfloat16
    want = attention.math(*in_float32(inputs), 3)
    assert (got.float() - want).abs().max() < 0.02 * want.abs().max()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("n_time", [256, 200])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_flex_forward_equals_math(n_time: int, heads: tuple[int, int]):
    inputs = qkv(n_time, heads, width=16, dtype=torch.float32)
    windows = (0, 3, 128, 130, n_time)
    flex = attention.make_flex(n_time, windows, "cpu")
    for window in windows:
        torch.testing.assert_close(flex(*inputs, window), attention.math(*inputs, window), rtol=1e-5, atol=1e-5)


CPU = torch.device("cpu")


def choose(kernel: str, windows: tuple[int, ...] = (4, 16)) -> tuple[str, attention.Attend]:
    return attention.choose(kernel, 16, windows, (4, 2, 8), CPU, torch.float32)


def test_choose_on_cpu():
    assert choose("auto") == ("sdpa", attention.sdpa)
    assert choose("sdpa") == ("sdpa", attention.sdpa)
    assert choose("math") == ("math", attention.math)


def test_choose_refuses_what_does_not_run_here_or_does_not_exist():
    with pytest.raises(ValueError, match=r"attention=flex does not work on this cpu device .*; set attention=sdpa"):
        choose("flex")
    with pytest.raises(ValueError, match="attention=flash: expected auto, sdpa, flex or math"):
        choose("flash")


def test_auto_probes_the_kernel_and_says_why_it_falls_back(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(attention, "probe_flex", lambda *_: "no kernel image")
    cuda = torch.device("cuda")  # named only: nothing is put there
    assert attention.choose("auto", 16, (4, 16), (4, 2, 8), cuda, torch.bfloat16) == ("sdpa", attention.sdpa)
    assert "flex_attention fails here (no kernel image); using sdpa" in capsys.readouterr().out


def test_the_probe_compares_numbers(monkeypatch: pytest.MonkeyPatch):
    def wrong(*_: object) -> attention.Attend:
        return lambda q, k, v, window: attention.math(q, k, v, window + 1)

    def right(*_: object) -> attention.Attend:
        return attention.sdpa

    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(attention, "make_flex", wrong)
    assert attention.probe_flex((4, 2, 16), CPU, torch.float32) == "its numbers differ from the plain ones"
    monkeypatch.setattr(attention, "make_flex", right)
    assert attention.probe_flex((4, 2, 16), CPU, torch.float32) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_kernels_on_cuda_in_bfloat16_with_gradients(kernel: str, heads: tuple[int, int]):
    n_time, windows = 640, (128, 200, 640)
    device = torch.device("cuda")
    name, attend = attention.choose(kernel, n_time, windows, (*heads, 64), device, torch.bfloat16)
    assert name == kernel
    inputs = qkv(n_time, heads, width=64, dtype=torch.bfloat16, device="cuda")
    for window in windows:
        want = with_grads(attention.math, in_float32(inputs), window)
        # One compilation a window: inside the model a window is a constant.
        run = torch.compile(lambda q, k, v, w: attend(q, k, v, w), fullgraph=True) if kernel == "flex" else attend
        torch._dynamo.reset()
        for got, expected in zip(with_grads(run, inputs, window), want):
            assert (got.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.gpu
def test_auto_on_cuda_takes_flex_where_a_window_hides_something():
    device = torch.device("cuda")
    assert attention.choose("auto", 2048, (512, 2048), (6, 6, 128), device, torch.bfloat16)[0] == "flex"
    assert attention.choose("auto", 2048, (2048,), (6, 6, 128), device, torch.bfloat16)[0] == "sdpa"
