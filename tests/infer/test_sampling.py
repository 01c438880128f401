"""Sampling: draws follow the softmax and depend on seed, position and logits alone; top-k is exact."""

import pytest
import torch
from torch import Tensor

from nanochat.infer import sampling


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
    greedy = batch_draw(logits, 50, temperature=0.0, top_k=1, full_vocab=False, candidates=1)
    assert torch.equal(greedy, torch.full((50,), wanted[0]))


@pytest.mark.parametrize(
    ("vocab", "n"), [(1, 1), (30, 30), (300, 5), (5000, 64), (4999, 20), (32768, 64), (32768, 256)]
)
def test_most_likely_is_sorted_by_logit_and_then_by_id(vocab: int, n: int):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, vocab, generator=generator)
    logits[1] = logits[1].round()
    logits[2] = 0
    logits[3, torch.randperm(vocab, generator=generator)[: vocab // 2]] = -torch.inf
    values, ids = sampling.most_likely(logits, n)
    wanted = [sorted(range(vocab), key=lambda i: (-row[i], i))[:n] for row in logits.tolist()]
    assert ids.tolist() == wanted
    assert torch.equal(values, logits.gather(1, ids))


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
