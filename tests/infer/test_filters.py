"""top_p, min_p, penalties, biases and log-probabilities, against a reference that works on one row at a time."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_engine import CONFIG, PARAMS, TOOLS, prompt, rows, start

from nanochat import model
from nanochat.config import UserError
from nanochat.infer import Request, TokenLogprobs, engine, sampling
from nanochat.infer.request import MAX_TOP_LOGPROBS


def reference_weights(logits: Sequence[float], request: Request, answer: Sequence[int]) -> dict[int, float]:
    """Return {token: its logit} of the tokens that may be drawn, in plain loops."""
    x = list(logits)
    for token in set(request.prompt) | set(answer):
        x[token] = x[token] / request.repetition_penalty if x[token] > 0 else x[token] * request.repetition_penalty
    for token in set(answer):
        x[token] -= request.frequency_penalty * answer.count(token) + request.presence_penalty
    for token, bias in request.logit_bias:
        x[token] += bias
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if request.temperature == 0:
        return {order[0]: x[order[0]]}
    order = order[: request.top_k or None]
    weights = [math.exp((x[token] - x[order[0]]) / request.temperature) for token in order]
    kept, before = [], 0.0
    for token, weight in zip(order, weights):
        if not kept or before / sum(weights) < request.top_p:
            kept.append((token, weight))
        before += weight
    return {token: x[token] for token, weight in kept if weight >= request.min_p}  # the first weight is 1


def reference_draw(logits: Sequence[float], request: Request, answer: Sequence[int]) -> int:
    """Return the token of the largest sum of logit and noise."""
    kept = reference_weights(logits, request, answer)
    ids, position = torch.tensor(list(kept)), len(request.prompt) + len(answer)
    noise = sampling.gumbel(torch.tensor(request.seed), torch.tensor(position), ids)
    return int(ids[(torch.tensor(list(kept.values())) + request.temperature * noise).argmax()])


def random_request(rng: random.Random, tokens: tuple[int, ...], vocab: int, **settings: Any) -> Request:
    chosen: dict[str, Any] = {
        "temperature": rng.choice((0.0, 0.5, 1.0, 1.7, 1.0, 1.7)),
        "top_k": rng.choice((0, 5, 50)),
        "top_p": rng.choice((0.0, 0.5, 0.9, 0.99, 1.0, 1.0)),
        "min_p": rng.choice((0.0, 0.0, 0.02, 0.3)),
        "repetition_penalty": rng.choice((0.8, 1.0, 1.3)),
        "presence_penalty": rng.choice((-1.0, 0.0, 0.5, 2.0)),
        "frequency_penalty": rng.choice((0.0, 0.7)),
        "logit_bias": tuple((rng.randrange(vocab), rng.choice((-100.0, 1.5, 5.0))) for _ in range(rng.randrange(4))),
        "seed": rng.randrange(2**40),
    }
    return Request(tokens, **(chosen | settings))


def test_draws_equal_the_reference_on_200_random_rows() -> None:
    rng, vocab, n = random.Random(0), 300, 200
    logits_BV = torch.randn(n, vocab, generator=torch.Generator().manual_seed(0)) * 2
    logits_BV[::5] = logits_BV[::5].round()  # with ties
    requests = [random_request(rng, prompt(rng.randint(1, 40), i), vocab) for i in range(n)]
    answers = [[rng.randrange(vocab) for _ in range(rng.choice((0, 3, 60)))] for _ in range(n)]
    filters = sampling.empty_filters(n, vocab, torch.device("cpu"))
    for row, (request, answer) in enumerate(zip(requests, answers)):
        sampling.set_filters_(filters, row, request)
        for token in (request.prompt[-1], *answer[:-1]):  # the last one is what the draw below is fed
            filters["seen"][row, token] += 2 * bool(answer)
    state = {
        "temperature_B": torch.tensor([request.temperature for request in requests]),
        "top_k_B": torch.tensor([request.top_k if request.temperature else 1 for request in requests]),
        "seed_B": torch.tensor([request.seed for request in requests]),
        "position_B": torch.tensor([len(r.prompt) + len(a) for r, a in zip(requests, answers)]),
        "fed_B": torch.tensor([(*r.prompt, *a)[-1] for r, a in zip(requests, answers)]),
        "is_new_B": torch.ones(n, dtype=torch.bool),
    }
    drawn = sampling.draw_filtered(logits_BV, filters, candidates=1, full_vocab=True, **state)
    expected = [reference_draw(*row) for row in zip(logits_BV.tolist(), requests, answers)]
    assert drawn.tolist() == expected
    narrow = [len(reference_weights(*row)) for row in zip(logits_BV.tolist(), requests, answers)]
    assert narrow.count(1) < n // 2 and len(set(narrow)) > 20, "the settings leave different numbers of tokens"


@torch.no_grad()
def reference_answer(request: Request) -> tuple[list[int], list[TokenLogprobs]]:
    """Return what whole forwards and the reference make of a request."""
    answer, logprobs = [], []
    while len(answer) < request.max_tokens and not (answer and answer[-1] in TOOLS.stops):
        logits = model.apply(PARAMS, torch.tensor([[*request.prompt, *answer]]), config=CONFIG)[0, -1]
        answer.append(reference_draw(logits.tolist(), request, answer))
        log_p = logits.double().log_softmax(0)
        top = log_p.topk(request.logprobs or 0)
        logprobs.append(TokenLogprobs(float(log_p[answer[-1]]), tuple(zip(top.indices.tolist(), top.values.tolist()))))
    return answer, logprobs


@pytest.mark.parametrize("async_depth", [0, 1])
def test_engine_equals_the_reference_alone_and_in_a_full_batch(async_depth: int) -> None:
    rng, vocab = random.Random(async_depth), CONFIG.vocab_size
    # A bias against the tool tokens: the reference has no tools.
    ban = tuple((token, -100.0) for token in (TOOLS.call_start, TOOLS.call_end))
    requests = [
        random_request(rng, prompt(rng.randint(1, 20), i), vocab, logit_bias=ban, max_tokens=8, logprobs=i % 6)
        for i in range(7)
    ]
    requests.append(Request(prompt(9), max_tokens=8, temperature=1.0, seed=3, logit_bias=()))  # an ordinary one
    llm, got = start(slots=8, async_depth=async_depth), {}
    for event in engine.run(llm, requests):
        got.setdefault(event.key, []).append(event)
    for i, request in enumerate(requests[:-1]):
        answer, logprobs = reference_answer(request)
        assert [event.token for event in got[i]] == answer, request
        for event, (logprob, top) in zip(got[i], logprobs):
            assert event.logprobs and event.logprobs.logprob == pytest.approx(logprob, abs=1e-4)
            assert [token for token, _ in event.logprobs.top] == [token for token, _ in top]
            assert [x for _, x in event.logprobs.top] == pytest.approx([x for _, x in top], abs=1e-4)
        assert [e.token for e in engine.run(start(slots=2, async_depth=async_depth), [request])] == answer, "alone"
    assert got[7][0].logprobs is None
    assert [event.token for event in got[7]] == rows(engine.run(start(slots=1), requests[7:]))[0], "among filtered ones"


def test_slots_forget_the_settings_of_earlier_requests() -> None:
    usual = Request(prompt(12), max_tokens=10, temperature=1.0, seed=5)
    filtered = dataclasses.replace(usual, presence_penalty=2.0, logit_bias=((7, 100.0),), top_p=0.5, max_tokens=3)
    llm = start(slots=2)
    first = rows(engine.run(llm, [usual]))[0]
    assert rows(engine.run(llm, [filtered]))[0] == [7, 7, 7]
    assert rows(engine.run(llm, [usual, dataclasses.replace(filtered, max_tokens=30)]))[0] == first


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"presence_penalty": math.nan}, "presence_penalty=nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty=inf"),
        ({"logit_bias": ((CONFIG.vocab_size, 1.0),)}, f"token {CONFIG.vocab_size}"),
        ({"logprobs": MAX_TOP_LOGPROBS + 1}, "logprobs=21"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        engine.admit(start(slots=1), 0, Request((1, 2), **settings))
