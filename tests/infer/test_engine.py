"""The engine: equal to the plain sampler, independent rows, continuous batching, tool calls, ends, shapes."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from small_model import WINDOWED, random_params
from torch import Tensor

from nanochat import model, tree
from nanochat.config import UserError
from nanochat.data import SPECIALS, Tokenizer
from nanochat.infer import Engine, Event, Request, engine, sampling, tool_use
from nanochat.model import ModelConfig, kv_cache

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))
CONFIG = dataclasses.replace(WINDOWED, vocab_size=TOKENIZER.vocab_size, n_layer=3)
BOS, STOP = TOKENIZER.bos, TOKENIZER.special("<|assistant_end|>")


def start(slots: int = 4, **settings: Any) -> Engine:
    how: dict[str, Any] = {"compile": False} | settings
    return engine.start(random_params(CONFIG), CONFIG, TOKENIZER, slots=slots, **how)


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def rows(events: Iterable[Event]) -> dict[int, list[int]]:
    """Return {key: its tokens}, and check that each row ends once."""
    tokens: dict[int, list[int]] = {}
    ended: set[int] = set()
    for event in events:
        assert isinstance(event.key, int) and event.key not in ended
        tokens.setdefault(event.key, []).append(event.token)
        if event.finish:
            ended.add(event.key)
    assert ended == set(tokens)
    return tokens


def plain(request: Request, params=None, config: ModelConfig = CONFIG) -> list[int]:
    """Return what the plain sampler makes of a greedy request, ended by the same tokens."""
    tokens = sampling.sample(
        params if params is not None else random_params(config),
        request.prompt,
        lambda params, tokens_BT: model.apply(params, tokens_BT, config=config),
        max_tokens=request.max_tokens,
    )
    ends = [i for i, token in enumerate(tokens) if token in (BOS, STOP)]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("async_depth", [0, 1])
def test_greedy_matches_plain_sampler_for_any_load(async_depth: int):
    requests = [Request(prompt(n, n), max_tokens=m, temperature=0) for n, m in ((1, 9), (5, 30), (40, 3), (129, 20))]
    requests += [Request(prompt(n, n), max_tokens=12, temperature=0) for n in (2, 130, 7, 16, 17)]
    got = rows(engine.run(start(slots=3, async_depth=async_depth), requests))
    assert got == {i: plain(request) for i, request in enumerate(requests)}


def test_seeded_row_does_not_depend_on_other_rows():
    mine = Request(prompt(20), max_tokens=25, temperature=1.0, top_k=50, seed=7)
    alone = rows(engine.run(start(slots=1), [mine]))[0]
    assert len(alone) > 5
    others = [
        Request(prompt(n, n), max_tokens=n, temperature=t, top_k=k, seed=n)
        for n, t, k in ((30, 1.0, 0), (3, 0.0, 50), (11, 2.0, 200), (25, 0.5, 1), (18, 1.0, 50))
    ]
    for where, async_depth in itertools.product((0, 2, 5), (0, 1)):
        batch = [*others[:where], mine, *others[where:]]
        assert rows(engine.run(start(slots=3, async_depth=async_depth), batch))[where] == alone
    assert rows(engine.run(start(slots=2, exact=True), [mine, *others]))[0] == alone
    other = dataclasses.replace(mine, seed=8)
    assert rows(engine.run(start(), [other]))[0] != alone


def test_samples_of_one_prompt_share_the_prefill(monkeypatch: pytest.MonkeyPatch):
    calls = []
    features = engine.model.decode_features

    def counted(*args, empty_cache: bool = False, **kwargs):
        calls.append(empty_cache)
        return features(*args, empty_cache=empty_cache, **kwargs)

    monkeypatch.setattr(engine.model, "decode_features", counted)
    requests = [Request(prompt(30), max_tokens=8, temperature=1.0, seed=i) for i in range(4)]
    got = rows(engine.run(start(), requests))
    assert calls.count(True) == 1 and len({tuple(x) for x in got.values()}) == 4


# --- a model that says what it is told: draws come from a script by seed and position -------------------------------


def script(monkeypatch: pytest.MonkeyPatch, texts: dict[int, list[int]], n_prompt: int) -> None:
    """Let row `seed` draw texts[seed], one after the other from position n_prompt on, forced positions included."""

    def drawn(logits_BV: Tensor, *, seed_B: Tensor, position_B: Tensor, **_) -> Tensor:
        out = []
        for seed, position in zip(seed_B.tolist(), position_B.tolist()):
            text = texts[seed]
            out.append(text[min(position - n_prompt, len(text) - 1)] if position >= n_prompt else 0)
        return torch.tensor(out)

    monkeypatch.setattr(sampling, "draw", drawn)


def ids(text: str) -> list[int]:
    """Return the ids of a text in which the names of special tokens stand for them."""
    found: list[int] = []
    while text:
        name = next((name for name in SPECIALS if text.startswith(name)), None)
        found += [TOKENIZER.special(name)] if name else TOKENIZER.encode(text[0])
        text = text[len(name or text[0]) :]
    return found


CALL = "I say <|python_start|>12*3<|python_end|>"
OUTPUT = "<|output_start|>36<|output_end|>"


@pytest.mark.parametrize("async_depth", [0, 1])
def test_tool_calls_force_their_result_into_the_row(monkeypatch: pytest.MonkeyPatch, async_depth: int):
    whole = [
        CALL + OUTPUT + " so 36.<|assistant_end|>",
        "<|python_start|>1/0<|python_end|> nothing<|assistant_end|>",  # no result: it goes on by itself
        "plain<|assistant_end|>",
        "<|python_end|>x<|output_start|>y<|assistant_end|>",  # markers out of place are tokens like others
        "<|python_start|>7<|python_start|>2+2<|python_end|><|output_start|>4<|output_end|><|bos|>",
        "<|python_start|>'strawberry'.count('r')<|python_end|><|output_start|>3<|output_end|>!<|assistant_end|>",
    ]
    n_prompt = 5
    script(monkeypatch, {i: ids(text) for i, text in enumerate(whole)}, n_prompt)
    llm = start(slots=4, async_depth=async_depth)
    requests = [Request(prompt(n_prompt, i), seed=i) for i in range(len(whole))]
    events = list(engine.run(llm, requests))
    assert rows(events) == {i: ids(text) for i, text in enumerate(whole)}
    forced = [event.token for event in events if event.key == 0 and not event.sampled]
    assert forced == ids(OUTPUT)
    assert [e.sampled for e in events if e.key in (1, 2, 3)] == [True] * sum(len(ids(t)) for t in whole[1:4])
    assert {e.finish for e in events} == {None, "stop"}
    assert engine.free_slots(llm) == 4


@pytest.mark.parametrize("async_depth", [0, 1])
def test_cache_matches_events_after_waiting_forcing_and_moving(monkeypatch: pytest.MonkeyPatch, async_depth: int):
    """Waiting, forcing and moving leave no trace: the cache is that of the whole row in one piece."""
    text = ids(CALL + OUTPUT + " and on and on and on")
    fillers = {i: ids("x" * (3 * i) + "<|assistant_end|>") for i in range(1, 4)}
    script(monkeypatch, {0: text, **fillers}, 5)
    llm = start(slots=4, async_depth=async_depth)
    for i in (1, 2, 3):
        engine.admit(llm, i, Request(prompt(5, i), seed=i))
    engine.admit(llm, 0, Request(prompt(5), seed=0))  # in the last slot, until the others have gone
    made: list[int] = []
    while len(made) < len(text):
        made += [event.token for event in engine.step(llm) if event.key == 0]
    row = llm.active[0]
    assert row.slot == 0, "it has moved"
    sequence = [*prompt(5), *made]
    length = int(llm.cache["length"][0])
    assert len(sequence) - 1 <= length <= len(sequence) + async_depth
    _, want = model.decode(
        random_params(CONFIG),
        torch.tensor([sequence[: len(sequence) - 1]]),
        kv_cache.empty(CONFIG, 1, len(sequence) - 1),
        config=CONFIG,
    )
    for i in range(CONFIG.n_layer):
        for name in ("k", "v"):
            got = llm.cache["layers"][str(i)][name][0, : len(sequence) - 1]
            torch.testing.assert_close(got, want["layers"][str(i)][name][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("max_tokens", range(1, 22))
def test_max_tokens_counts_forced_tokens_and_ends_anywhere(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, async_depth: int
):
    text = ids(CALL + OUTPUT + "<|assistant_end|>")
    script(monkeypatch, {0: text}, 5)
    events = list(engine.run(start(slots=1, async_depth=async_depth), [Request(prompt(5), max_tokens=max_tokens)]))
    assert [event.token for event in events] == text[:max_tokens]
    assert events[-1].finish == ("stop" if max_tokens >= len(text) else "length")


@pytest.mark.parametrize("async_depth", [0, 1])
def test_row_ends_at_the_context_while_others_continue(async_depth: int):
    tries = (Request(prompt(30, seed), max_tokens=12, temperature=0) for seed in range(100))
    long = next(request for request in tries if len(plain(request)) == 12)  # one that does not stop by itself
    long, other = dataclasses.replace(long, max_tokens=500), Request(prompt(4), max_tokens=35, temperature=0)
    llm = start(slots=2, context=40, async_depth=async_depth)
    got = rows(engine.run(llm, [long, other]))
    assert len(got[0]) == 10 and got[0] == plain(dataclasses.replace(long, max_tokens=10))
    assert got[1] == plain(other)


def test_cancelled_row_frees_its_slot_at_once():
    llm = start(slots=2)
    for key in ("a", "b"):
        engine.admit(llm, key, Request(prompt(5), max_tokens=50, temperature=0))
    engine.step(llm)
    engine.cancel(llm, "a")
    engine.cancel(llm, "never there")
    assert engine.free_slots(llm) == 1
    assert {event.key for event in engine.step(llm)} == {"b"}
    engine.admit(llm, "c", Request(prompt(9, 9), max_tokens=5, temperature=0))
    seen: dict[object, list[int]] = {}
    while engine.free_slots(llm) < 2:
        for event in engine.step(llm):
            seen.setdefault(event.key, []).append(event.token)
    assert seen["c"] == plain(Request(prompt(9, 9), max_tokens=5))
    assert engine.step(llm) == []


@pytest.mark.parametrize("async_depth", [0, 1])
def test_closing_the_iterator_cancels_active_rows(async_depth: int):
    llm = start(slots=2, async_depth=async_depth)
    requests = [Request(prompt(5, i), max_tokens=20, temperature=0) for i in range(5)]
    events = engine.run(llm, requests)
    next(events)
    events.close()
    assert engine.free_slots(llm) == 2
    with pytest.raises(UserError, match="at least one"):
        list(engine.run(llm, [requests[0], Request(())]))
    assert rows(engine.run(llm, requests)) == {i: plain(request) for i, request in enumerate(requests)}


def test_invalid_requests_are_refused():
    llm = start(slots=1, context=20)
    for request, why in (
        (Request(()), "at least one"),
        (Request(prompt(20)), "leaves no room"),
        (Request((1, CONFIG.vocab_size)), "within 0"),
        (Request((-1,)), "within 0"),
        (Request((1,), max_tokens=0), "max_tokens"),
        (Request((1,), temperature=float("nan")), "temperature=nan"),
        (Request((1,), top_k=-1), "top_k=-1"),
        (Request((1,), seed=2**63), "seed of 64 bits"),
    ):
        with pytest.raises(UserError, match=why):
            engine.admit(llm, 0, request)
    assert engine.free_slots(llm) == 1
    engine.admit(llm, 0, Request((1,)))
    with pytest.raises(UserError, match="in use"):
        engine.admit(llm, 0, Request((1,)))
    with pytest.raises(UserError, match="no slot is free"):
        engine.admit(llm, 1, Request((1,)))
    with pytest.raises(UserError, match="slots=0"):
        start(slots=0)


@pytest.mark.slow
def test_compiled_equals_eager_with_few_graphs():
    """One for a row alone and one for any number of them."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    config = dataclasses.replace(CONFIG, n_layer=2)  # a ring, and a layer that sees all
    params = random_params(config)
    requests = [Request(prompt(n, n), max_tokens=15, temperature=1.0, seed=n) for n in (3, 20, 7, 30, 5)]
    eager, compiled = (engine.start(params, config, TOKENIZER, slots=4, compile=how) for how in (False, True))
    assert rows(engine.run(compiled, requests[:1])) == rows(engine.run(eager, requests[:1]))
    assert rows(engine.run(compiled, requests)) == rows(engine.run(eager, requests))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_warm_up_covers_every_shape_and_changes_nothing():
    requests = [Request(prompt(n, n), max_tokens=15, temperature=1.0, seed=n) for n in (3, 20, 7, 30, 5)]
    llm = start(slots=6)
    shapes, run = [], llm.step_fn
    llm.step_fn = lambda *args, **how: (shapes.append((len(args[3]), how["span"])), run(*args, **how))[1]
    engine.warm_up(llm)
    warm = set(shapes)
    assert warm == {(rows, span) for rows in (1, 2, 4, 6) for span in (32, 64, 128, 256)}
    assert rows(engine.run(llm, requests)) == rows(engine.run(start(slots=6), requests))
    assert set(shapes) == warm and {span for _, span in set(shapes[len(warm) * 2 :])} == {32, 64}


def test_draw_settings_fit_the_largest_top_k():
    usual, general = engine.USUAL, engine.GENERAL
    for top_ks, want in (
        ([50, 1, 64], usual),
        ([65], general),
        ([0, 50], general),
        ([257, 0], general | {"candidates": 300}),
    ):
        requests = [Request((1,), top_k=top_k) for top_k in top_ks]
        assert engine._draw_settings(requests, vocab_size=300) == want
    assert engine._draw_settings([Request((1,), top_k=0, temperature=0)], vocab_size=300) == usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_params_replaces_parameters_and_keeps_compiled_code(dtype: torch.dtype):
    """What it compiled stays, what it has computed of a prompt does not, and the caller's tensors are not touched."""
    requests = [Request(prompt(n, n), max_tokens=9, temperature=1.0, seed=n) for n in (5, 12, 12)]
    first, second = random_params(CONFIG), random_params(CONFIG, seed=1)

    def fresh(params: Any) -> Engine:
        return engine.start(params, CONFIG, TOKENIZER, slots=2, compile=False, dtype=dtype, copy_params=True)

    want = [rows(engine.run(fresh(params), requests)) for params in (first, second)]
    assert want[0] != want[1]
    kept = {name: x.clone() for name, x in tree.flatten(first).items()}
    llm = fresh(first)
    addresses = [x.data_ptr() for x in tree.leaves(llm.params)]
    assert rows(engine.run(llm, requests)) == want[0]
    for params, found in ((second, want[1]), (first, want[0])):
        engine.load_params_(llm, params)
        assert rows(engine.run(llm, requests)) == found
    assert [x.data_ptr() for x in tree.leaves(llm.params)] == addresses
    assert all(torch.equal(x, kept[name]) for name, x in tree.flatten(first).items())
    engine.admit(llm, 0, requests[0])
    with pytest.raises(ValueError, match="1 requests are active"):
        engine.load_params_(llm, second)
    engine.cancel(llm, 0)
    with pytest.raises(ValueError, match="n_embd=32, the one attached to the parameters 64"):
        engine.load_params_(llm, random_params(dataclasses.replace(CONFIG, n_embd=64)))
    with pytest.raises(ValueError, match="copy_params=True"):
        engine.load_params_(start(), second)


def test_tool_call_state_machine():
    tools = tool_use.tool_tokens(TOKENIZER, evaluate=lambda text: text.upper() if text == "ok" else None)
    name = TOKENIZER.special
    state, forced = tool_use.step(tools, None, name("<|python_start|>"))
    for token in TOKENIZER.encode("ok"):
        state, forced = tool_use.step(tools, state, token)
        assert forced == ()
    state, forced = tool_use.step(tools, state, name("<|python_end|>"))
    assert state is None
    assert forced == (name("<|output_start|>"), *TOKENIZER.encode("OK"), name("<|output_end|>"))
    assert tool_use.step(tools, (65,), name("<|python_end|>")) == (None, ())
    assert set(tools.blocking) == {BOS, STOP, name("<|python_end|>")}
