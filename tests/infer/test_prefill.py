"""Prefill: chunks between decode steps, prompts together, and beginnings that are computed once."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_engine import CONFIG, prompt, rows, start
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.config import UserError
from nanochat.infer import Event, Request, engine, prefill


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The (rows, tokens a row) of each call that computes prompts."""
    shapes, features = [], prefill.decode_features

    def recorded(params: Any, tokens_BT: torch.Tensor, *args: Any, **settings: Any) -> Any:
        shapes.append(tuple(tokens_BT.shape))
        return features(params, tokens_BT, *args, **settings)

    monkeypatch.setattr(prefill, "decode_features", recorded)
    yield shapes


def events_of(events: list[Event], key: int) -> list[tuple[int, Any]]:
    return [(event.token, event.logprobs) for event in events if event.key == key]


@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
def test_running_rows_wait_for_one_chunk_at_most(computed: Any, async_depth: int, exact: bool) -> None:
    """Seven rows run when a prompt of the full context arrives; its text is the one that it has alone."""
    long = Request(prompt(CONFIG.sequence_len - 6), max_tokens=6, temperature=0)
    (alone,) = rows(engine.run(start(slots=1), [long])).values()
    llm = start(slots=8, async_depth=async_depth, exact=exact, chunk=32)
    for i in range(7):
        engine.admit(llm, i, Request(prompt(5 + i, i), max_tokens=200, temperature=1.0, seed=i))
    while sum(row.slot >= 0 for row in llm.active.values()) < 7:
        engine.step(llm)
    computed.clear()
    engine.admit(llm, "long", long)
    got: list[int] = []
    while "long" in llm.active:
        n_before = len(computed)
        events = engine.step(llm)
        assert {event.key for event in events if event.sampled} >= {k for k in llm.active if k != "long"}
        assert sum(n * t for n, t in computed[n_before:]) <= 32
        got += [event.token for event in events if event.key == "long"]
    assert got == alone
    assert len(computed) == -(-(len(long.prompt) - 1) // 32)


def test_prompts_of_one_width_are_computed_together(computed: Any) -> None:
    requests = [Request(prompt(n, n), max_tokens=5, temperature=0) for n in (20, 25, 30, 9, 12, 70)]
    want = [rows(engine.run(start(slots=1), [request]))[0] for request in requests]
    computed.clear()
    assert rows(engine.run(start(slots=6), requests)) == dict(enumerate(want))
    assert computed == [(3, 32), (2, 16), (1, 128)]


def test_a_shared_beginning_is_computed_once(computed: Any) -> None:
    system = prompt(100)
    requests = [Request((*system, *prompt(5 + i, i)), max_tokens=8, temperature=1.0, seed=i) for i in range(6)]
    want = rows(engine.run(start(slots=6, prefix_tokens=0), requests))
    computed.clear()
    llm = start(slots=6)
    assert rows(engine.run(llm, requests)) == want
    assert computed == [(1, 128), (5, 16)], "one prompt as a whole, then what is different in the others, together"
    assert (llm.prefill.prefixes.hits, llm.prefill.prefixes.tokens_saved) == (5, 5 * 96)
    computed.clear()
    assert rows(engine.run(llm, requests[:2] * 3)) == {i: want[i % 2] for i in range(6)}
    assert not computed, "whole prompts are found as well"


@pytest.mark.parametrize("exact", [False, True])
def test_texts_are_the_same_with_and_without_the_prefix_cache(exact: bool) -> None:
    """If exact, to the last bit, for prompts in any order that share beginnings of any length."""
    rng = random.Random(0)
    stems = [prompt(150, i) for i in range(2)]
    requests = []
    for i in range(14):
        stem = rng.choice(stems)[: rng.choice((20, 32, 64, 65, 100, 150))]
        tokens = (*stem, *prompt(rng.choice((0, 1, 40)), rng.randrange(3)))
        requests.append(Request(tokens, max_tokens=4, temperature=1.0, seed=i, logprobs=3))
    texts: list[list[Any]] = []
    for settings in ({"slots": 1, "prefix_tokens": 0}, {"slots": 5}, {"slots": 3, "prefix_tokens": 10_000}):
        # All slots are computed if exact; the number of slots itself may change the rounding.
        llm = start(exact=exact, **(settings | ({"slots": 5} if exact else {})))
        events = list(engine.run(llm, requests))
        texts.append([events_of(events, key) for key in range(len(requests))])
        assert llm.prefill.prefixes.tokens <= llm.prefill.prefixes.max_tokens
        assert (llm.prefill.prefixes.hits > 0) == (settings.get("prefix_tokens") != 0)
    if exact:
        assert texts[0] == texts[1] == texts[2]
    else:
        tokens = [[[token for token, _ in text] for text in some] for some in texts]
        assert tokens[0] == tokens[1] == tokens[2]


def test_the_prefix_cache_drops_what_was_not_used_for_longest() -> None:
    llm = start(slots=1, prefix_tokens=100)
    first, second, third = (Request(prompt(65, i), max_tokens=1) for i in range(3))
    for request in (first, second, first, third):
        list(engine.run(llm, [request]))
    prefixes = llm.prefill.prefixes
    assert prefixes.tokens == sum(block.kv_L2SKH.shape[2] for block in prefixes.blocks.values()) <= 100
    assert prefixes.hits == 1, "the first prompt's beginning outlived the second prompt"
    list(engine.run(llm, [dataclasses.replace(third, max_tokens=2)]))
    assert prefixes.hits == 2 and prefixes.tokens_saved >= 32 + 64


def test_cancelled_prompts_are_not_computed_further(computed: Any) -> None:
    llm = start(slots=3)
    engine.admit(llm, "runs", Request(prompt(3), max_tokens=60, temperature=0))
    want = [event.token for event in engine.run(start(slots=1), [Request(prompt(3), max_tokens=60, temperature=0)])]
    got = [event.token for event in engine.step(llm)]
    engine.admit(llm, "long", Request(prompt(200, 1)))
    engine.admit(llm, "next", Request(prompt(40, 2)))
    got += [event.token for event in engine.step(llm)]
    engine.cancel(llm, "long")
    engine.cancel(llm, "next")
    n_computed = len(computed)
    while llm.active:
        got += [event.token for event in engine.step(llm)]
    assert got == want and len(computed) == n_computed and engine.free_slots(llm) == 3


def test_sizes_out_of_range_are_refused() -> None:
    for settings in ({"chunk": 0}, {"prefix_tokens": -1}):
        with pytest.raises(UserError, match="expected at least 1 and 0 tokens"):
            start(**settings)


def test_tokens_reach_a_gpu_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is not from pinned memory, or blocking, would wait for the decode step before."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cuda:0"):
                copies.append((args[0].device.type, id(args[0]) in pinned, kwargs.get("non_blocking")))
            return func(*args, **kwargs or {})

    pinned: set[int] = set()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.add(id(self)), self)[1])
    with FakeTensorMode(), Copies():
        assert prefill._on_device([[1, 2], [3, 0]], torch.device("cuda:0")).shape == (2, 2)
    assert copies == [("cpu", True, True)]
