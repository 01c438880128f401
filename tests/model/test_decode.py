"""Cached decoding against the full forward: every split, ragged rows, rings, grouped heads, depths, the fixed point."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG, WINDOWED, Unchanged, assert_trees_close, random_params
from tensordict import TensorDict
from torch._inductor.utils import run_and_get_code

from nanochat import model, tree
from nanochat.distributed import compile_fn
from nanochat.model import ModelConfig, kv_cache

TOLERANCE = 1e-4  # the spec's, for float32


def ids(rows: int, n_time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (rows, n_time), generator=torch.Generator().manual_seed(seed))


def by_parts(
    config: ModelConfig, params: TensorDict, tokens: torch.Tensor, parts: list[int], context: int | None = None
) -> torch.Tensor:
    """Return the logits of `tokens`, decoded in parts of the given lengths."""
    cache, logits = kv_cache.empty(config, tokens.shape[0], context or tokens.shape[1]), []
    for part in tokens.split(parts, dim=1):
        out, cache = model.decode(params, part, cache, config=config)
        logits.append(out)
    assert cache["length"].tolist() == [tokens.shape[1]] * tokens.shape[0]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decode_equals_apply_for_every_split_and_depth(depth: int, kv_heads: int):
    config = dataclasses.replace(CONFIG, n_layer=depth, n_kv_head=kv_heads)
    params, tokens = random_params(config), ids(2, 12)
    want = model.apply(params, tokens, config=config)
    for parts in ([12], [1] * 12, [5, 1, 1, 5], [11, 1], [1, 11]):
        assert (by_parts(config, params, tokens, parts) - want).abs().max() < TOLERANCE, parts


# A short window has 128 tokens at least: its ring of 129 slots is filled, and passed, at several kinds of border.
@pytest.mark.parametrize("pattern", ["SSSL", "S", "L", "LS"])
@pytest.mark.parametrize("parts", [[128, 1, 1, 1, 1, 168], [300], [129, 171], [1, 130, 169], [290] + [1] * 10], ids=str)
def test_ring_cache_equals_apply_for_windows(pattern: str, parts: list[int]):
    config = dataclasses.replace(WINDOWED, window_pattern=pattern, n_layer=4)
    params, tokens = random_params(config), ids(1, 300)
    want = model.apply(params, tokens, config=config)
    assert (by_parts(config, params, tokens, parts) - want).abs().max() < TOLERANCE


def test_ring_cache_has_window_plus_one_slots():
    cache = kv_cache.empty(WINDOWED, rows=2, context=200)
    assert [cache["layers", str(i), "k"].shape[1] for i in range(3)] == [129, 129, 200]
    row = kv_cache.empty(WINDOWED, 1, 200, dtype=torch.bfloat16)
    assert tree.nbytes(row) == (129 + 129 + 200) * 2 * 2 * 8 * 2 + 32 * 2 + 8


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
)
def test_rows_of_different_lengths_equal_each_row_alone(lengths: list[list[int]], seed: int):
    """Each row takes its own number of tokens in each of three calls: the logits are those of the row alone."""
    config = CONFIG
    params, rows = random_params(config), len(lengths)
    tokens = ids(rows, 27, seed)
    cache, done = kv_cache.empty(config, rows, 27), [0] * rows
    for call in range(3):
        added = [row[call] for row in lengths]
        width = max(1, *added)
        given_BT = ids(rows, width, seed + 1 + call)  # what fills up is random too
        for b, n in enumerate(added):
            given_BT[b, :n] = tokens[b, done[b] : done[b] + n]
        logits, cache = model.decode(params, given_BT, cache, added_B=torch.tensor(added), config=config)
        for b, n in enumerate(added):
            if n:
                want = model.apply(params, tokens[b : b + 1, : done[b] + n], config=config)[0, done[b] :]
                assert (logits[b, :n] - want).abs().max() < TOLERANCE
            done[b] += n
    assert cache["length"].tolist() == done


def test_chunks_extend_a_cache_without_rings_and_the_first_uses_the_attention_kernel():
    params, tokens = random_params(WINDOWED), ids(2, 200)
    config = dataclasses.replace(WINDOWED, window_pattern="L")
    cache, called = kv_cache.empty(config, 2, 200), []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        called.append(window)
        return model.Compute().attend(q, k, v, window)

    compute, done = model.Compute(attend=attend), 0
    want = model.features(params, tokens, config=WINDOWED)
    for n in (140, 1, 37, 22):
        chunk = tokens[:, done : done + n]
        x, cache = model.decode_features(params, chunk, cache, start=done, config=WINDOWED, compute=compute)
        assert (x - want[:, done : done + n]).abs().max() < TOLERANCE
        done += n
    assert called == [128, 128, 256] and cache["length"].tolist() == [200, 200]


def test_decode_is_pure_and_inplace_decode_writes_into_the_cache():
    params, tokens = random_params(WINDOWED), ids(2, 141)
    _, cache = model.decode(params, tokens[:, :140], kv_cache.empty(WINDOWED, 2, 200), config=WINDOWED)
    with Unchanged(params, cache):
        want, want_cache = model.decode(params, tokens[:, 140:], cache, config=WINDOWED)
    before = {name: x.data_ptr() for name, x in tree.flatten(cache).items() if name.startswith("layers")}
    got, got_cache = model.decode(params, tokens[:, 140:], cache, config=WINDOWED, inplace=True)
    assert torch.equal(got, want)
    assert_trees_close(got_cache, want_cache, rtol=0)
    assert {name: tree.flatten(got_cache)[name].data_ptr() for name in before} == before


def test_fused_qkv_gives_the_same_logits():
    params, tokens = random_params(), ids(2, 9)
    with Unchanged(params):
        fused = model.fuse_qkv(params)
    assert fused["layers"]["1"]["attn"].keys() == {"proj", "qkv"}
    got = model.apply(fused, tokens, config=CONFIG)
    assert (got - model.apply(params, tokens, config=CONFIG)).abs().max() < TOLERANCE


@pytest.mark.slow
def test_compiled_step_equals_eager_and_copies_no_cache():
    """The trap: given slots that are a slice, or a stack of layers, the compiler copies the whole cache and back."""
    config = dataclasses.replace(WINDOWED, n_layer=2)  # a ring, and a layer that sees all
    rows, context, tokens = 2, 230, ids(2, 150)
    params = tree.nest(tree.flatten(random_params(config)))
    _, cache = model.decode(
        params, tokens[:, :140], tree.nest(tree.flatten(kv_cache.empty(config, rows, context))), config=config
    )

    def step(params: dict, tokens: torch.Tensor, cache: dict) -> torch.Tensor:
        logits, new = model.decode(params, tokens, cache, span=145, config=config)
        tree.map(lambda old, x: old.copy_(x), cache, new)
        return logits

    with torch.no_grad():
        want, want_cache = model.decode(params, tokens[:, 140:141], cache, config=config)
        got, (code,) = run_and_get_code(compile_fn(step), params, tokens[:, 140:141], cache)
    assert (got - want).abs().max() < 1e-5
    assert_trees_close(cache, want_cache, atol=1e-5)
    made = [tuple(map(int, shape.split(","))) for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]+\d),? ?\)", code)]
    assert made and max(math.prod(shape) for shape in made) < rows * 129 * config.n_kv_head * config.head_dim
