"""The engine: equal to loops without a cache under random loads; independent rows, tool calls, ends, shapes."""

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from scripted_draws import script_draws
from small_engine import CONFIG, PARAMS, TOKENIZER, TOOLS, prompt, rows, start
from small_model import random_params
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import model, tree
from nanochat.config import UserError
from nanochat.data import SPECIALS
from nanochat.infer import Engine, Request, engine, sampling, tool_use

Made = list[tuple[int, bool, str | None]]  # token, sampled, finish


def ids(text: str) -> list[int]:
    """Return the ids of a text in which the names of special tokens stand for them."""
    tokens: list[int] = []
    while text:
        name = next((name for name in SPECIALS if text.startswith(name)), None)
        tokens += [TOKENIZER.special(name)] if name else TOKENIZER.encode(text[0])
        text = text[len(name or text[0]) :]
    return tokens


@torch.no_grad()
def plain(request: Request, script: Sequence[int | None] = (), context: int = 256) -> Made:
    """Return what a script, the most likely tokens and the tools make of a request, by whole forwards."""
    row, made, call = list(request.prompt), [], None
    while True:
        token = script[len(made)] if len(made) < len(script) else None
        if token is None:
            token = int(model.apply(PARAMS, torch.tensor([row]), config=CONFIG)[0, -1].argmax())
        call, forced = tool_use.step(TOOLS, call, token)
        for i, new in enumerate((token, *forced)):
            row.append(new)
            full = len(made) + 1 >= request.max_tokens or len(row) >= context
            finish = "stop" if new in TOOLS.stops else "length" if full else None
            made.append((new, i == 0, finish))
            if finish:
                return made


# Calls that end, fail, begin anew, or never end, and stops
CALLS = [
    "<|python_start|>12*3<|python_end|>",
    "<|python_start|>1/0<|python_end|>",
    "<|python_start|>7<|python_start|>2+2<|python_end|>",
    "<|python_start|>100,000*3<|python_end|><|python_start|>2-5<|python_end|>",
    "<|python_start|>'aaaa'.count('a')<|python_end|>",
    "<|python_start|>1+",
    "<|python_end|>",
    "<|output_start|>x",
    "<|assistant_end|>",
]


def random_requests(rng: random.Random, context: int) -> tuple[list[Request], list[list[int | None]]]:
    """Return requests, some with the same prompt or up to the context, and what each draws, None: the likeliest."""
    lengths = [rng.choice((1, 2, 5, context - 1, rng.randint(1, context - 1))) for _ in range(6)]
    prompts = [prompt(length, rng.randrange(100)) for length in lengths]
    requests, scripts = [], []
    for seed in range(rng.randint(4, 10)):
        script: list[int | None] = [None] * rng.randrange(6)
        for _ in range(rng.randrange(3)):
            script += [*ids(rng.choice(CALLS)), *[None] * rng.randrange(5)]
        settings: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 3, 8, 30)), "top_k": rng.choice((0, 1, 50, 100))}
        requests.append(Request(rng.choice(prompts), temperature=0, seed=seed, **settings))
        scripts.append(script)
    return requests, scripts


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("async_depth", [0, 1])
def test_random_loads_equal_a_loop_without_cache(monkeypatch: pytest.MonkeyPatch, seed: int, async_depth: int):
    rng = random.Random(f"{seed} {async_depth}")
    context = rng.choice((20, 60, 150, 256, 300))  # within the shortest window, and over it
    requests, scripts = random_requests(rng, context)
    expected = [plain(request, script, context) for request, script in zip(requests, scripts)]
    script_draws(monkeypatch, lambda request: scripts[request.seed])
    llm = start(slots=rng.randint(1, 5), context=context, exact=rng.random() < 0.2, async_depth=async_depth)
    made: dict[Any, Made] = {key: [] for key in range(len(requests))}
    n_admitted, cancelled = 0, set()
    while n_admitted < len(requests) or llm.active:
        chance = rng.random()
        if n_admitted < len(requests) and engine.free_slots(llm) and chance < 0.5:
            engine.admit(llm, n_admitted, requests[n_admitted])
            n_admitted += 1
        elif llm.active and chance > 0.97:
            cancelled.add(key := rng.choice(list(llm.active)))
            engine.cancel(llm, key)
            engine.cancel(llm, key)  # a second time: ignored
        else:
            for event in engine.step(llm):
                assert event.key not in cancelled
                made[event.key].append((event.token, event.sampled, event.finish))
    for key, (got, want) in enumerate(zip(made.values(), expected)):
        assert got == (want[: len(got)] if key in cancelled else want), f"request {key} of {requests}, {scripts[key]}"
    assert engine.free_slots(llm) == llm.slots
    assert int(llm.cache["length"].max()) <= context


def test_tool_calls_force_their_result_into_the_row(monkeypatch: pytest.MonkeyPatch):
    texts = [
        "I say <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|> so 36.<|assistant_end|>",
        "<|python_start|>1/0<|python_end|> nothing<|assistant_end|>",  # no result: it continues by itself
        "<|python_end|>x<|output_start|>y<|assistant_end|>",  # markers out of place are tokens like others
        "<|python_start|>7<|python_start|>2+2<|python_end|><|output_start|>4<|output_end|><|bos|>",
    ]
    script_draws(monkeypatch, lambda request: ids(texts[request.seed]))
    llm = start()
    completions = list(engine.complete(llm, [Request(prompt(5, i), seed=i) for i in range(len(texts))]))
    assert [completion.tokens for completion in completions] == [ids(text) for text in texts]
    forced = [token for token, sampled in zip(completions[0].tokens, completions[0].sampled) if not sampled]
    assert forced == ids("<|output_start|>36<|output_end|>") and all(completions[1].sampled)
    assert {completion.finish for completion in completions} == {"stop"}
    assert completions[0].content == completions[0].tokens[:-1]
    (cut,) = engine.complete(llm, [Request(prompt(5), max_tokens=3)])
    assert cut.finish == "length" and cut.content == cut.tokens == ids(texts[0])[:3]


def test_seeded_row_does_not_depend_on_other_rows():
    request = Request(prompt(20), max_tokens=25, temperature=1.0, top_k=50, seed=7)
    alone = rows(engine.run(start(slots=1), [request]))[0]
    assert len(alone) > 5
    others = [
        Request(prompt(n, n), max_tokens=n, temperature=t, top_k=k, seed=n)
        for n, t, k in ((30, 1.0, 0), (3, 0.0, 50), (11, 2.0, 200), (25, 0.5, 1), (18, 1.0, 50))
    ]
    for index, async_depth in itertools.product((0, 2, 5), (0, 1)):
        batch = [*others[:index], request, *others[index:]]
        assert rows(engine.run(start(slots=3, async_depth=async_depth), batch))[index] == alone
    assert rows(engine.run(start(slots=2, exact=True), [request, *others]))[0] == alone
    assert rows(engine.run(start(), [dataclasses.replace(request, seed=8)]))[0] != alone


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
    assert rows(engine.run(llm, requests)) == {i: [x for x, *_ in plain(r)] for i, r in enumerate(requests)}


def test_invalid_requests_are_refused():
    llm = start(slots=1, context=20)
    for request, reason in (
        (Request(()), "at least one"),
        (Request(prompt(20)), "leaves no room"),
        (Request((1, CONFIG.vocab_size)), "within 0"),
        (Request((-1,)), "within 0"),
        (Request((1,), max_tokens=0), "max_tokens"),
        (Request((1,), temperature=float("nan")), "temperature=nan"),
        (Request((1,), top_k=-1), "top_k=-1"),
        (Request((1,), seed=2**63), "seed of 64 bits"),
    ):
        with pytest.raises(UserError, match=reason):
            engine.admit(llm, 0, request)
    assert engine.free_slots(llm) == 1
    engine.admit(llm, 0, Request((1,)))
    for key, reason in ((0, "in use"), (1, "no slot is free")):
        with pytest.raises(UserError, match=reason):
            engine.admit(llm, key, Request((1,)))
    with pytest.raises(UserError, match="slots=0"):
        start(slots=0)


VARIED = [Request(prompt(n, n), max_tokens=15, temperature=1.0, seed=n) for n in (3, 20, 7, 30, 5)]


@pytest.mark.slow
def test_compiled_equals_eager_with_few_graphs():
    """One for a row alone and one for any number of them."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    config = dataclasses.replace(CONFIG, n_layer=2)  # a ring, and a layer that sees all
    params = random_params(config)
    eager, compiled = (engine.start(params, config, TOKENIZER, slots=4, compile=on) for on in (False, True))
    for requests in (VARIED[:1], VARIED):
        assert rows(engine.run(compiled, requests)) == rows(engine.run(eager, requests))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_warm_up_covers_every_shape_and_changes_nothing():
    llm = start(slots=6)
    shapes, step_fn = [], llm.step_fn

    def recorded(*args: Any, **settings: Any) -> Tensor:
        shapes.append((len(args[3]), settings["span"]))
        return step_fn(*args, **settings)

    llm.step_fn = recorded
    engine.warm_up(llm)
    warm = set(shapes)
    assert warm == {(rows, span) for rows in (1, 2, 4, 6) for span in (32, 64, 128, 256)}
    assert rows(engine.run(llm, VARIED)) == rows(engine.run(start(slots=6), VARIED))
    assert set(shapes) == warm and {span for _, span in set(shapes[len(warm) * (len(sampling.WAYS) - 1) :])} == {32, 64}


@pytest.mark.slow
def test_every_way_of_drawing_compiles_for_models_of_several_sizes(monkeypatch: pytest.MonkeyPatch):
    """With numbers in place of symbols, in a graph of its own."""
    compiler = functools.partial(torch.compile, fullgraph=True, backend="eager")
    monkeypatch.setattr(engine, "compile_fn", compiler)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for count, (width, vocab_size) in enumerate(((32, 2048), (64, 4096)), 1):
        config = dataclasses.replace(CONFIG, n_layer=1, n_embd=width, vocab_size=vocab_size)
        llm = engine.start(random_params(config), config, TOKENIZER, slots=1, context=32, compile=True)
        engine.warm_up(llm)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count * (len(sampling.WAYS) - 1)


def test_way_of_drawing_fits_the_largest_top_k():
    for top_ks, expected in (([50, 64], "usual"), ([65, 0], "general"), ([257, 0], "sorted")):
        assert sampling.cheapest_way([Request((1,), top_k=top_k) for top_k in top_ks]) == expected
    greedy = [Request((1,), top_k=0, temperature=0), Request((1,), top_k=1)]
    assert sampling.cheapest_way(greedy) == "greedy"
    assert sampling.cheapest_way([*greedy, Request((1,), top_k=2)]) == "usual"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_greedy_steps_neither_sort_nor_draw_noise(temperature: float):
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    names: set[str] = set()
    llm = start()
    with Operators():
        list(engine.run(llm, [dataclasses.replace(request, temperature=temperature) for request in VARIED]))
    assert names & {"topk", "sort", "log"} == (set() if temperature == 0 else {"topk", "log"})


def test_recorded_graphs_share_one_memory_pool(monkeypatch: pytest.MonkeyPatch):
    pools: list[Any] = []

    class Graph:
        used: Any = None

        def pool(self) -> Any:
            return self.used

        def replay(self) -> None:
            pass

    @contextlib.contextmanager
    def record(graph: Any, pool: Any = None) -> Iterator[None]:
        graph.used = object() if pool is None else pool
        pools.append(graph.used)
        yield

    cuda = mock.MagicMock(CUDAGraph=Graph, graph=record)
    fake = mock.MagicMock(wraps=torch, cuda=cuda)
    fake.empty = lambda shape, dtype, pin_memory: torch.empty(shape, dtype=dtype)
    llm = start(slots=2)
    llm.graphs = {}
    monkeypatch.setattr(engine, "torch", fake)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    engine.warm_up(llm)
    assert len(pools) == len(llm.graphs) == 2 * 4 * (len(sampling.WAYS) - 1) and len(set(pools)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_params_replaces_parameters_in_place(dtype: torch.dtype):
    """What is compiled stays, the cache of the last prompt does not, and the caller's tensors are not touched."""
    requests = [Request(prompt(n, n), max_tokens=9, temperature=1.0, seed=n) for n in (5, 12, 12)]
    first, second = random_params(CONFIG), random_params(CONFIG, seed=1)

    def fresh(params: Any) -> Engine:
        return engine.start(params, CONFIG, TOKENIZER, slots=2, compile=False, dtype=dtype, copy_params=True)

    expected = [rows(engine.run(fresh(params), requests)) for params in (first, second)]
    assert expected[0] != expected[1]
    before = {name: x.clone() for name, x in tree.flatten(first).items()}
    llm = fresh(first)
    addresses = [x.data_ptr() for x in tree.leaves(llm.params)]
    assert rows(engine.run(llm, requests)) == expected[0]
    for params, want in ((second, expected[1]), (first, expected[0])):
        engine.load_params_(llm, params)
        assert rows(engine.run(llm, requests)) == want
    assert [x.data_ptr() for x in tree.leaves(llm.params)] == addresses
    assert all(torch.equal(x, before[name]) for name, x in tree.flatten(first).items())
    engine.admit(llm, 0, requests[0])
    with pytest.raises(ValueError, match="1 requests are active"):
        engine.load_params_(llm, second)
    engine.cancel(llm, 0)
    with pytest.raises(ValueError, match="n_embd=32, the one attached to the parameters 64"):
        engine.load_params_(llm, random_params(dataclasses.replace(CONFIG, n_embd=64)))
    with pytest.raises(ValueError, match="copy_params=True"):
        engine.load_params_(start(), second)
