"""The engine under random loads against a loop without a cache: every token, forced or not, of every row that came."""

import random
from typing import Any

import pytest
import torch
from small_model import random_params
from torch import Tensor

from nanochat import infer, model
from nanochat.infer import Request, sampling, tool_use
from tests.infer.test_engine import CONFIG, TOKENIZER, ids, prompt

TOOLS = tool_use.tool_tokens(TOKENIZER)
PARAMS = random_params(CONFIG)
CALLS = [  # what a row is made to say here and there: calls that end, fail, begin anew, or never end, and stops
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
Told = dict[int, int]  # position -> the token that a row has to draw there
Made = list[tuple[int, bool, str | None]]  # token, sampled, finish


def plain(request: Request, told: Told, context: int) -> Made:
    """Return what the most likely tokens, the told ones and the tools make of a request, by whole forwards."""
    row, made, call = list(request.prompt), [], None
    while True:
        logits_BTV = model.apply(PARAMS, torch.tensor([row]), config=CONFIG)
        token = told.get(len(row), int(logits_BTV[0, -1].argmax()))
        call, forced = tool_use.step(TOOLS, call, token)
        for i, new in enumerate((token, *forced)):
            row.append(new)
            full = len(made) + 1 >= request.max_tokens or len(row) >= context
            finish = "stop" if new in TOOLS.stops else "length" if full else None
            made.append((new, i == 0, finish))
            if finish:
                return made


def random_requests(rng: random.Random, context: int) -> tuple[list[Request], list[Told]]:
    """Return requests, some with the same prompt or up to the context, and what each is told to draw (by its seed)."""
    lengths = [rng.choice((1, 2, 5, context - 1, rng.randint(1, context - 1))) for _ in range(6)]
    prompts = [prompt(length, rng.randrange(100)) for length in lengths]
    requests, all_told = [], []
    for seed in range(rng.randint(4, 10)):
        chosen, told = rng.choice(prompts), {}
        position = len(chosen) + rng.randrange(6)
        for _ in range(rng.randrange(3)):
            for token in ids(rng.choice(CALLS)):
                told[position] = token
                position += 1
            position += rng.randrange(5)
        settings = {"max_tokens": rng.choice((1, 2, 3, 8, 30)), "top_k": rng.choice((0, 1, 50, 100))}
        requests.append(Request(chosen, temperature=0, seed=seed, **settings))
        all_told.append(told)
    return requests, all_told


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("async_depth", [0, 1])
@torch.no_grad()
def test_random_loads_equal_a_loop_without_cache(monkeypatch: pytest.MonkeyPatch, seed: int, async_depth: int) -> None:
    rng = random.Random(f"{seed} {async_depth}")
    context = rng.choice((20, 60, 150, 256, 300))  # within the shortest window, and over it
    requests, told = random_requests(rng, context)
    wanted = [plain(request, each, context) for request, each in zip(requests, told)]
    draw = sampling.draw

    def drawn(logits_BV: Tensor, *, seed_B: Tensor, position_B: Tensor, **how: Any) -> Tensor:
        found_B = draw(logits_BV, seed_B=seed_B, position_B=position_B, **how)
        for row, (key, position) in enumerate(zip(seed_B.tolist(), position_B.tolist())):
            found_B[row] = told[key].get(position, int(found_B[row]))
        return found_B

    monkeypatch.setattr(sampling, "draw", drawn)
    how: dict[str, Any] = {"slots": rng.randint(1, 5), "context": context, "exact": rng.random() < 0.2}
    decoder = infer.start(PARAMS, CONFIG, TOKENIZER, compile=False, async_depth=async_depth, **how)
    made: list[Made] = [[] for _ in requests]
    begun, cancelled = 0, set()
    while begun < len(requests) or decoder.active:
        chance = rng.random()
        if begun < len(requests) and infer.free_slots(decoder) and chance < 0.5:
            infer.admit(decoder, begun, requests[begun])
            begun += 1
        elif decoder.active and chance > 0.97:
            cancelled.add(key := rng.choice(list(decoder.active)))
            infer.cancel(decoder, key)
        else:
            for event in infer.step(decoder):
                assert event.key not in cancelled
                made[int(str(event.key))].append((event.token, event.sampled, event.finish))
    for key, (got, want) in enumerate(zip(made, wanted)):
        assert got == (want[: len(got)] if key in cancelled else want), f"request {key} of {requests}, told {told[key]}"
    assert infer.free_slots(decoder) == how["slots"]
    assert int(decoder.cache["length"].max()) <= context
