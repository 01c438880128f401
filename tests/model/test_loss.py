"""The loss: chunks against the plain form, and every transformation of torch.func on it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_model import CONFIG, LargestTensor, assert_trees_close, random_batch, random_params
from torch import Tensor

from nanochat import transform, tree
from nanochat.model import Compute, Params, attention, linear, loss

MATH = Compute(attend=attention.math)
Chunked = tuple[Tensor, Tensor, Tensor]


def head_inputs(rows: int = 24, vocab: int = 100, dtype: torch.dtype = torch.float32) -> Chunked:
    """Return (x, lm_head, targets) as the last layer sees them; the table is padded by 28 rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 32, generator=generator).to(dtype)
    weight = torch.randn(vocab + 28, 32, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::5] = -1
    return x, weight, targets


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: capped logits, cross entropy, mean over what counts."""
    logits = 15 * torch.tanh(F.linear(x, weight.to(x.dtype))[:, :100].float() / 15)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    counted = targets >= 0
    return -(picked * counted).sum() / counted.sum().clamp_min(1)


def with_grads(f: Callable[..., Tensor], inputs: Chunked, factor: float = 1.0) -> list[Tensor]:
    x, weight = (t.clone().requires_grad_() for t in inputs[:2])
    value = f(x, weight, inputs[2])
    return [value.detach(), *torch.autograd.grad(factor * value, [x, weight])]


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 7, 8, 24, 1000])  # one token, no divisor, a divisor, all, more than all
def test_chunked_loss_equals_the_plain_loss(chunk: int, factor: float):
    inputs = head_inputs()
    got = with_grads(lambda x, w, t: loss.chunked(x, w, t, 100, chunk), inputs, factor)
    for value, want in zip(got, with_grads(plain, inputs, factor)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-7)
    assert not got[2][100:].any(), "the padding of the vocabulary got a gradient"
    assert not got[1][::5].any(), "an ignored target got a gradient"
    with torch.no_grad():  # another path: no gradient is made
        torch.testing.assert_close(loss.chunked(*inputs, 100, chunk), got[0])


@pytest.mark.parametrize("chunk", [None, 7, 1000])
def test_weights_give_a_weighted_sum(chunk: int | None):
    params, batch = random_params(), random_batch()
    weights = torch.randn(batch["targets"].shape, generator=torch.Generator().manual_seed(1))
    weights[:, ::3] = 0.0

    def f(params: Params, weights: Tensor) -> Tensor:
        return loss.next_token(params, batch | {"weights": weights}, config=CONFIG, chunk_tokens=chunk)[0]

    def definition(params: Params) -> Tensor:
        return (weights * loss.per_token(params, batch, config=CONFIG)).sum()

    grads, value = transform.value_and_grad(f)(params, weights)
    wanted_grads, wanted = transform.value_and_grad(definition)(params)
    torch.testing.assert_close(value, wanted)
    assert_trees_close(grads, wanted_grads, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(f(params, weights), wanted)
    grads, value = transform.value_and_grad(f)(params, torch.zeros_like(weights))
    assert value == 0 and not any(g.any() for g in tree.leaves(grads))


def test_tiny_weights_do_not_underflow_in_float16():
    x, weight, targets = head_inputs(dtype=torch.float16)
    weights = torch.full((len(x),), 2.0**-40)
    _, grad_x, grad_weight = with_grads(
        lambda x, w, t: loss.chunked(x, w, t, 100, 7, weights_R=weights), (x, weight, targets), 2.0**40
    )
    exact = with_grads(lambda x, w, t: len(x) * plain(x, w, t), (x.float(), weight, targets))
    counted = (targets >= 0).sum() / len(x)
    for got, want in ((grad_x, exact[1]), (grad_weight, exact[2])):
        assert (got.float() - counted * want).norm() < 0.003 * want.norm()


@pytest.mark.parametrize("factor", [1.0, 2.0**16])
def test_chunked_float16_gradients_neither_underflow_nor_overflow(factor: float):
    """The probability of most tokens, divided by the rows, is under float16's range; a loss scale is over it."""
    generator = torch.Generator().manual_seed(0)
    rows, vocab = 2048, 2048
    x, weight = torch.randn(rows, 16, generator=generator).half(), 0.1 * torch.randn(vocab, 16, generator=generator)
    targets = torch.randint(0, vocab // 2, (rows,), generator=generator)  # the other half of the table is no target
    value, grad_x, grad_weight = with_grads(
        lambda x, w, t: loss.chunked(x, w, t, vocab, 512), (x, weight, targets), factor
    )
    exact = with_grads(lambda x, w, t: loss.chunked(x, w, t, vocab, 512), (x.float(), weight, targets), factor)
    torch.testing.assert_close(value, exact[0], rtol=1e-3, atol=0)
    for got, want in ((grad_x, exact[1]), (grad_weight, exact[2]), (grad_weight[vocab // 2 :], exact[2][vocab // 2 :])):
        assert (got.float() - want).norm() < 0.003 * want.norm()


@pytest.mark.parametrize("chunk", [None, 7])
def test_no_targets_give_zero_loss_and_gradient(chunk: int | None):
    batch = random_batch()
    nothing = {**batch, "targets": torch.full_like(batch["targets"], -1)}
    f = transform.value_and_grad(lambda p: loss.next_token(p, nothing, config=CONFIG, chunk_tokens=chunk)[0])
    grads, value = f(random_params())
    assert value == 0 and not any(g.any() for g in tree.leaves(grads))


def test_chunked_loss_never_holds_all_logits():
    rows, vocab, chunk = 256, 1000, 16
    inputs = head_inputs(rows, vocab)

    def peak(f: Callable[..., Tensor]) -> int:
        with LargestTensor() as largest:
            with_grads(f, inputs)
        return largest.numel

    def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x, weight[:vocab])
        return F.cross_entropy(15 * torch.tanh(logits / 15), targets, ignore_index=-1)

    assert peak(whole) >= rows * vocab  # the probe sees them where they are
    assert peak(lambda x, w, t: loss.chunked(x, w, t, vocab, chunk)) <= (vocab + 28) * 32  # the table itself


@pytest.mark.parametrize("f, backend", [(linear.fp8, "aot_eager"), (linear.fp8_emulated, "aot_eager_decomp_partition")])
def test_chunked_fp8_equals_a_loop_over_chunks_eager_and_compiled(f: linear.Linear, backend: str):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(48, 128, generator=generator), 0.2 * torch.randn(256, 128, generator=generator)
    targets = torch.randint(0, 250, (48,), generator=generator)
    targets[::5] = -1

    def loop(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = torch.cat([f(rows, weight)[:, :250] for rows in x.split(32)])
        return F.cross_entropy(15 * torch.tanh(logits / 15), targets, ignore_index=-1)

    def run(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return loss.chunked(x, weight, targets, 250, 32, f)

    torch._dynamo.reset()
    want = with_grads(loop, (x, weight, targets))
    for g in (run, torch.compile(run, fullgraph=True, backend=backend)):
        got = with_grads(g, (x, weight, targets))
        for value, expected in zip(got, want):
            # A gradient next to the middle of two e5m2 values may round the other way.
            assert (value - expected).norm() < 3e-3 * expected.norm()
        assert not got[2][250:].any(), "the padding of the vocabulary got a gradient"
    # Rows that are no multiple of 16 are dense, in every chunk.
    odd = (x[:40], weight, targets[:40])
    for a, b in zip(with_grads(run, odd), with_grads(lambda x, w, t: loss.chunked(x, w, t, 250, 32), odd)):
        assert torch.equal(a, b)


# --- torch.func on the loss -----------------------------------------------------------------------------------------


def mean_loss(
    params: Params, batch: dict[str, Tensor], compute: Compute = Compute(), chunk_tokens: int | None = None
) -> Tensor:
    return loss.next_token(params, batch, config=CONFIG, compute=compute, chunk_tokens=chunk_tokens)[0]


def in_float64(seed: int = 0) -> Params:
    return tree.map(lambda x: x.double(), random_params(seed=seed))


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_every_gradient_equals_finite_differences(chunk_tokens: int | None):
    params, batch, step = in_float64(), random_batch(), 1e-6

    def f(params: Params) -> Tensor:
        return mean_loss(params, batch, chunk_tokens=chunk_tokens)

    flat = tree.flatten(params)
    for name, grad in tree.flatten(torch.func.grad(f)(params)).items():
        place = tuple(int(i) for i in torch.unravel_index(grad.abs().argmax(), grad.shape))
        nudge = torch.zeros_like(grad)
        nudge[place] = step
        ahead, behind = (f(tree.unflatten(flat | {name: flat[name] + s * nudge})) for s in (1, -1))
        torch.testing.assert_close(grad[place], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("compute", [Compute(), MATH], ids=["sdpa", "math"])
def test_per_example_gradients_equal_a_loop(compute: Compute):
    params, batch = in_float64(), random_batch(rows=3)  # the sums of some gradients cancel to 1e-4 in float32

    def one(params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(params, {"inputs": inputs[None], "targets": targets[None]}, compute)

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, batch["inputs"], batch["targets"])
    for i in range(3):
        alone = transform.value_and_grad(one)(params, batch["inputs"][i], batch["targets"][i])[0]
        assert_trees_close(tree.map(lambda g: g[i], each), alone, rtol=1e-9)  # noqa: B023


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:Attempted to insert a get_attr Node")
def test_directional_derivatives_agree_with_the_gradient_and_its_finite_differences():
    params, direction, batch, step = in_float64(), in_float64(seed=1), random_batch(), 1e-6

    def f(params: Params) -> Tensor:
        return mean_loss(params, batch, MATH)

    grad = torch.func.grad(f)
    _, slope = torch.func.jvp(f, (params,), (direction,))  # pyright: ignore[reportAssignmentType]
    torch.testing.assert_close(slope, sum(tree.leaves(tree.map(lambda g, d: (g * d).sum(), grad(params), direction))))
    _, push = torch.func.linearize(f, params)
    torch.testing.assert_close(push(direction), slope)
    # Forward over reverse: the Hessian times a direction.
    _, product = torch.func.jvp(grad, (params,), (direction,))  # pyright: ignore[reportAssignmentType]
    ahead, behind = (grad(tree.map(lambda p, d: p + s * step * d, params, direction)) for s in (1, -1))  # noqa: B023
    assert_trees_close(product, tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind), rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 32768])
def test_chunked_loss_on_cuda_in_bfloat16(vocab: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 256, generator=generator).to("cuda", torch.bfloat16)
    weight = (0.1 * torch.randn(vocab + 64, 256, generator=generator)).cuda()
    targets = torch.randint(0, vocab, (2048,), generator=generator).cuda()
    targets[::9] = -1

    def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x.float(), weight[:vocab].to(torch.bfloat16).float())
        return F.cross_entropy(15 * torch.tanh(logits / 15), targets, ignore_index=-1)

    inputs = (x, weight, targets)
    got = with_grads(lambda x, w, t: loss.chunked(x, w, t, vocab, 300), inputs)
    for value, want in zip(got, with_grads(whole, inputs)):
        assert (value.float() - want.float()).abs().max() < 0.03 * want.float().abs().max()
