"""Sampling: greedy against a loop, top-k, temperature, seeds and stops."""

from collections import Counter

import pytest
import torch
from small_model import CONFIG, random_params
from tensordict import TensorDict
from torch import Tensor

from nanochat import model
from nanochat.infer import sampling

PROMPT = [5, 17, 3]


def logits_fn(params: TensorDict, tokens_BT: Tensor) -> Tensor:
    return model.apply(params, tokens_BT, config=CONFIG)


def greedy(n: int) -> list[int]:
    """Return the most likely continuation by a loop over the definition."""
    params, ids = random_params(), list(PROMPT)
    for _ in range(n):
        ids.append(int(logits_fn(params, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_temperature_zero_is_greedy():
    got = sampling.sample(random_params(), PROMPT, logits_fn, max_tokens=20)
    assert got == greedy(20) and len(got) == 20 > CONFIG.sequence_len
    one = sampling.sample(random_params(), PROMPT, logits_fn, max_tokens=20, temperature=1.0, top_k=1)
    assert one == got, "top_k=1 leaves one choice"


def test_sample_ends_before_a_stop_token():
    want = greedy(12)
    stop = want[6]
    got = sampling.sample(random_params(), PROMPT, logits_fn, max_tokens=12, stop={stop, 10_000})
    assert got == want[: want.index(stop)]
    assert sampling.sample(random_params(), PROMPT, logits_fn, max_tokens=12, stop=[want[0]]) == []
    assert sampling.sample(random_params(), PROMPT, logits_fn, max_tokens=0) == []


def test_sample_depends_on_the_seed_only():
    def run(seed: int) -> list[int]:
        return sampling.sample(random_params(), PROMPT, logits_fn, max_tokens=10, temperature=1.0, seed=seed)

    torch.manual_seed(0)
    first = run(3)
    state = torch.manual_seed(1).get_state()
    assert run(3) == first and run(4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_changes_no_argument_and_needs_no_gradient():
    def watched(params: TensorDict, tokens_BT: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return logits_fn(params, tokens_BT)

    prompt = list(PROMPT)
    sampling.sample(random_params(), prompt, watched, max_tokens=2)
    assert prompt == PROMPT


LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])


def draw(n: int, **how: float) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    rows = sampling.choose(LOGITS.expand(n, 5), generator=generator, **how)  # pyright: ignore[reportArgumentType]
    return Counter(rows.tolist())


def test_choose_follows_the_softmax():
    n = 20_000
    for temperature in (1.0, 0.5, 2.0):
        seen = draw(n, temperature=temperature, top_k=0)
        for token, p in enumerate((LOGITS[0] / temperature).softmax(0).tolist()):
            assert abs(seen[token] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_top_k_keeps_the_most_likely():
    n = 20_000
    seen = draw(n, temperature=1.0, top_k=2)
    assert set(seen) == {1, 3}
    assert seen[1] / n == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=0.02)
    assert set(draw(n, temperature=3.0, top_k=100)) == {0, 1, 2, 3, 4}, "more than there are keeps all"


def test_choose_is_independent_per_row():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    assert sampling.choose(logits, temperature=0, top_k=0).tolist() == logits.argmax(-1).tolist()
    got = sampling.choose(logits, temperature=0.7, top_k=3)
    assert got.shape == (4,) and got.dtype == torch.int64
    assert torch.equal(logits, before)


# --- draws of a batch ------------------------------------------------------------------------------------------------


def batch_draw(logits: Tensor, n: int, **settings: float) -> Tensor:
    """Return n draws from (V,) logits, with a seed and a position each."""
    values = {"temperature": 1.0, "top_k": 0} | settings
    return sampling.draw(
        logits.expand(n, -1),
        temperature_B=torch.full((n,), float(values["temperature"])),
        top_k_B=torch.full((n,), int(values["top_k"])),
        seed_B=torch.arange(n) // 100,
        position_B=torch.arange(n) % 100,
        candidates=int(values.get("candidates", 64)),
        full_vocab=bool(values.get("full_vocab", True)),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float):
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -3.0]), 40_000
    counts = torch.bincount(batch_draw(logits, n, temperature=temperature), minlength=6)
    want = n * (logits / temperature).softmax(-1)
    chi_squared = ((counts - want) ** 2 / want).sum()
    assert chi_squared < 25, "5 degrees of freedom: a fair generator exceeds this once in 7,000 times"


def test_candidates_and_full_vocab_draw_the_same():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    whole = batch_draw(logits, 2000, top_k=10)
    assert set(whole.tolist()) == set(logits.topk(10).indices.tolist())
    assert torch.equal(batch_draw(logits, 2000, top_k=10, full_vocab=False), whole)
    assert torch.equal(batch_draw(logits, 2000, top_k=10, full_vocab=False, candidates=256), whole)
    best = batch_draw(logits, 50, temperature=0.0)
    assert torch.equal(best, logits.argmax().expand(50))


def test_ties_rank_by_id_and_top_k_is_exact():
    """In bfloat16 many logits are equal, and which of them are sorted out first is the kernel's affair."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)).round()
    wanted = sorted(range(500), key=lambda i: (-logits[i].item(), i))[:10]
    assert logits[wanted[9]] == logits[wanted[8]] and (logits == logits[wanted[9]]).sum() > 20, "the border is a tie"
    whole = batch_draw(logits, 2000, top_k=10, temperature=2.0)
    assert set(whole.tolist()) == set(wanted)
    for candidates in (10, 64, 256):
        drawn = batch_draw(logits, 2000, top_k=10, temperature=2.0, full_vocab=False, candidates=candidates)
        assert torch.equal(drawn, whole)
        greedy = batch_draw(logits, 50, temperature=0.0, top_k=1, full_vocab=False, candidates=candidates)
        assert torch.equal(greedy, torch.full((50,), wanted[0]))


def test_noise_of_seeds_positions_and_tokens_is_independent():
    seed, position, token = (torch.arange(40).view(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    uniform = torch.exp(-torch.exp(-sampling.gumbel(seed, position, token)))
    assert (uniform.mean() - 0.5).abs() < 0.005 and (uniform.std() - 12**-0.5).abs() < 0.005
    for axis in range(3):
        for step in (1, 2, 16):
            a, b = uniform.narrow(axis, 0, 40 - step).flatten(), uniform.narrow(axis, step, 40 - step).flatten()
            assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.02, (axis, step)
    assert uniform.unique().numel() > 63_000, "of 64,000 values of 23 bits, a few fall together"
    large = sampling.gumbel(torch.tensor([2**62, 2**62 + 1, -5]), torch.tensor(7), torch.tensor(3))
    assert large.isfinite().all() and large.unique().numel() == 3
