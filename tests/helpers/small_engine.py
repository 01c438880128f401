"""An engine with a small random model, and what its tests share."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from small_model import WINDOWED, random_params

from nanochat.data import Tokenizer
from nanochat.infer import Engine, Event, engine, tool_use

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))
CONFIG = dataclasses.replace(WINDOWED, vocab_size=TOKENIZER.vocab_size, n_layer=3)
PARAMS = random_params(CONFIG)
TOOLS = tool_use.tool_tokens(TOKENIZER)


def start(slots: int = 4, **settings: Any) -> Engine:
    options: dict[str, Any] = {"compile": False} | settings
    return engine.start(PARAMS, CONFIG, TOKENIZER, slots=slots, **options)


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def rows(events: Iterable[Event]) -> dict[Any, list[int]]:
    """Return {key: its tokens}, and check that each row ends once."""
    tokens: dict[Any, list[int]] = {}
    ended = set()
    for event in events:
        assert event.key not in ended
        tokens.setdefault(event.key, []).append(event.token)
        if event.finish:
            ended.add(event.key)
    assert ended == set(tokens)
    return tokens
