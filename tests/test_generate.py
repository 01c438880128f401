"""Sampling: greedy against a loop, top-k, temperature, seeds and stops."""

from collections import Counter

import pytest
import torch
from small_model import CONFIG, random_params
from tensordict import TensorDict
from torch import Tensor

from nanochat import generate, model

PROMPT = [5, 17, 3]


def logits_fn(params: TensorDict, tokens_BT: Tensor) -> Tensor:
    return model.apply(params, tokens_BT, config=CONFIG)


def greedy(n: int) -> list[int]:
    """Return the most likely continuation by a loop over the definition."""
    params, ids = random_params(), list(PROMPT)
    for _ in range(n):
        ids.append(int(logits_fn(params, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_temperature_zero_is_greedy_also_beyond_the_context():
    got = generate.sample(random_params(), PROMPT, logits_fn, max_tokens=20)
    assert got == greedy(20) and len(got) == 20 > CONFIG.sequence_len
    one = generate.sample(random_params(), PROMPT, logits_fn, max_tokens=20, temperature=1.0, top_k=1)
    assert one == got, "top_k=1 leaves one choice"


def test_it_ends_before_the_first_stop_token():
    want = greedy(12)
    stop = want[6]
    got = generate.sample(random_params(), PROMPT, logits_fn, max_tokens=12, stop={stop, 10_000})
    assert got == want[: want.index(stop)]
    assert generate.sample(random_params(), PROMPT, logits_fn, max_tokens=12, stop=[want[0]]) == []
    assert generate.sample(random_params(), PROMPT, logits_fn, max_tokens=0) == []


def test_a_seed_gives_the_same_sample_whatever_the_global_generator():
    def run(seed: int) -> list[int]:
        return generate.sample(random_params(), PROMPT, logits_fn, max_tokens=10, temperature=1.0, seed=seed)

    torch.manual_seed(0)
    first = run(3)
    state = torch.manual_seed(1).get_state()
    assert run(3) == first and run(4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_prompt_is_not_changed_and_no_gradient_is_made():
    def watched(params: TensorDict, tokens_BT: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return logits_fn(params, tokens_BT)

    prompt = list(PROMPT)
    generate.sample(random_params(), prompt, watched, max_tokens=2)
    assert prompt == PROMPT


LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])


def draw(n: int, **how: float) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    rows = generate.choose(LOGITS.expand(n, 5), generator=generator, **how)  # pyright: ignore[reportArgumentType]
    return Counter(rows.tolist())


def test_choose_draws_by_the_probabilities():
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


def test_choose_works_row_by_row_and_changes_nothing():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    assert generate.choose(logits, temperature=0, top_k=0).tolist() == logits.argmax(-1).tolist()
    got = generate.choose(logits, temperature=0.7, top_k=3)
    assert got.shape == (4,) and got.dtype == torch.int64
    assert torch.equal(logits, before)
