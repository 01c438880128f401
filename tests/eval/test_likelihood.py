"""Scores of batched answers with shared prefixes against the logits of each prompt alone."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG, WINDOWED, LargestTensor, random_params

from nanochat import model
from nanochat.eval import likelihood
from nanochat.eval.likelihood import PackedRow, Prompt, Scored
from nanochat.model import ModelConfig

SHORT = ModelConfig(sequence_len=8, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="L")


def alone(config: ModelConfig, prompt: Prompt) -> tuple[float, int]:
    """Return (nats, greedy tokens) of an answer, from the logits of the whole prompt."""
    ids, start, end = prompt
    logits = model.apply(random_params(config), torch.tensor([ids]), config=config)[0, start - 1 : end - 1]
    targets = torch.tensor(ids[start:end], dtype=torch.int64)
    return F.cross_entropy(logits, targets, reduction="sum").item(), int((logits.argmax(-1) == targets).sum())


def draw_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100) for _ in range(count)]


def draw_group(rng: random.Random, prompts: int, most: int) -> list[Prompt]:
    """Return prompts that may share a prefix, with answers anywhere after the first token."""
    shared, group = draw_ids(rng, rng.randint(0, most)), []
    for _ in range(prompts):
        ids = [99, *shared, *draw_ids(rng, rng.randint(1, 9))]
        start = rng.randint(1, len(ids) - 1)
        group.append(Prompt(ids, start, rng.randint(start, len(ids))))
    return group


def assert_as_alone(config: ModelConfig, groups: list[list[Prompt]], results: list[list[Scored]]) -> None:
    for group, scores in zip(groups, results, strict=True):
        for prompt, got in zip(group, scores, strict=True):
            nats, correct = alone(config, prompt)
            assert got.n_tokens == prompt.end - prompt.start and got.n_correct_greedy == correct
            assert got.nats == pytest.approx(nats, rel=1e-6, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    tokens_per_batch=st.sampled_from([1, 60, 200, None]),
)
@pytest.mark.slow
def test_groups_are_scored_as_each_prompt_alone(seed: int, sizes: list[int], tokens_per_batch: int | None):
    """Includes prompts longer than the reach of all windows of SHORT (25 tokens)."""
    rng = random.Random(seed)
    groups = [draw_group(rng, size, 60) for size in sizes]
    results = likelihood.score(random_params(SHORT), SHORT, groups, tokens_per_batch=tokens_per_batch)
    assert_as_alone(SHORT, groups, results)


@pytest.mark.parametrize("config", [WINDOWED, dataclasses.replace(WINDOWED, n_layer=1)], ids=["3", "1 layer"])
def test_windows_reach_from_continuations_into_the_prefix(config: ModelConfig):
    rng = random.Random(0)
    shared = draw_ids(rng, 300)
    prompts = [Prompt([*shared, *draw_ids(rng, n)], 301, 300 + n) for n in (5, 140, 2)]
    other = [Prompt([*shared[:200], *draw_ids(rng, n)], 199, 200 + n) for n in (3, 4)]
    results = likelihood.score(random_params(config), config, [prompts, other], tokens_per_batch=2000)
    assert_as_alone(config, [prompts, other], results)


def test_tokens_out_of_reach_are_skipped():
    assert likelihood.receptive_tokens(SHORT) == 25
    ids = list(range(90))
    whole, *_ = likelihood.pack_rows([[Prompt(ids, 80, 82)]], 25)[0]
    assert whole == PackedRow(54, ids[54:], [], [(25, 80, 0), (26, 81, 0)])
    two = [Prompt([*ids[:70], 1, 2, 3], 71, 73), Prompt([*ids[:70], 4, 5], 71, 72)]
    (row,) = likelihood.pack_rows([two], 25)[0]
    assert row.skipped == 45 and row.prefix == ids[45:70] and row.continuations == [[1, 2, 3], [4, 5]]
    assert row.targets == [(25, 2, 0), (26, 3, 0), (28, 5, 1)]


def test_receptive_tokens_is_exact():
    """A token further before an answer changes nothing; the last one within does."""
    ids = torch.tensor([draw_ids(random.Random(0), 60)])
    params = random_params(SHORT)
    want, changed = model.features(params, ids, config=SHORT), []
    for i in range(60):
        other = ids.clone()
        other[0, i] = (other[0, i] + 1) % 100
        changed.append((model.features(params, other, config=SHORT) != want)[0, 59].any().item())
    assert changed.index(True) == 59 - likelihood.receptive_tokens(SHORT)


def test_equal_prompts_get_equal_scores_to_the_last_bit():
    one, other = Prompt([1, 2, 3, 4], 2, 4), Prompt([1, 2, 5], 2, 3)
    rows, numbers = likelihood.pack_rows([[one, other, one], [one]], 100)
    assert numbers == [[0, 1, 0], [3]]
    assert [row.continuations for row in rows] == [[[2, 3, 4], [2, 5]], []]
    first, _, third = likelihood.score(random_params(), CONFIG, [[one, other, one]])[0]
    assert first == third


def test_greedy_tokens_are_counted():
    params, ids = random_params(), [5, 6, 7]
    for _ in range(4):
        ids.append(int(model.apply(params, torch.tensor([ids]), config=CONFIG)[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % 100]
    groups = [[Prompt(ids, 3, 7), Prompt(wrong, 3, 7)], [Prompt(ids, 2, 2)]]
    (right, but_one), (empty,) = likelihood.score(params, CONFIG, groups)
    assert right[1:] == (4, 4) and but_one[1:] == (3, 4)
    assert empty == Scored(0.0, 0, 0)


def test_batches_hold_every_row_once_and_bound_size_and_padding():
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(200)]
    rows = [PackedRow(0, [0] * n, [[0] * rng.randint(0, 9)] * 2, [(0, 0, i)]) for i, n in enumerate(lengths)]
    batches = likelihood.make_batches(rows, 2000)
    assert sorted(row.targets[0][2] for batch in batches for row in batch) == list(range(200))
    sizes = []
    for batch in batches:
        tokens = likelihood.assemble(batch).tokens_BT
        used = sum(len(row.prefix) + sum(map(len, row.continuations)) for row in batch)
        assert tokens.numel() <= 2000
        assert tokens.numel() - used <= tokens.numel() / 8 or tokens.numel() <= 2000 / 8
        sizes.append(tokens.shape[1])
    assert len(batches) < 30 and sizes[0] > sizes[-1]
    assert [len(batch) for batch in likelihood.make_batches(rows[:3], 1)] == [1, 1, 1], "a row is never truncated"


def test_logits_are_computed_at_targets_only():
    config = ModelConfig(sequence_len=64, vocab_size=5000, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    groups, params = [[Prompt(draw_ids(random.Random(i), 60), 58, 60)] for i in range(8)], random_params(config)
    with LargestTensor() as largest:
        likelihood.score(params, config, groups)
    n_targets, table = 16, params["lm_head"].numel()
    assert largest.numel <= max(n_targets * config.vocab_size, table) < 60 * config.vocab_size
