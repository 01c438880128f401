"""Answers in a grammar: valid whatever the model draws, and no other row notices."""

import json

import pytest
import small_engine

from nanochat import infer
from nanochat.config import UserError
from nanochat.infer import grammar

SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 3}


@pytest.mark.parametrize("async_depth", [0, 1])
def test_rows_follow_their_grammar_and_leave_others_alone(async_depth: int) -> None:
    free = infer.Request(small_engine.prompt(5), 30, temperature=1.0, top_k=0, seed=7)
    text = grammar.from_json_schema(SCHEMA)
    biased = ((ord("5"), 100.0), (ord("7"), -100.0))
    requests = [free] + [
        infer.Request(
            small_engine.prompt(5, seed), 30, temperature=2.0, top_k=0, seed=seed, grammar=text, logit_bias=bias
        )
        for seed, bias in enumerate([(), (), biased])
    ]
    engine = small_engine.start(4, async_depth=async_depth, exact=True)
    alone = next(infer.complete(engine, [free]))
    first, *others = infer.complete(engine, requests)
    assert first == alone
    for completion in others:
        values = json.loads(small_engine.TOKENIZER.decode(completion.content))
        assert completion.finish == "stop" and 2 <= len(values) <= 3 and all(0 <= value <= 9 for value in values)
    assert set(values) == {5}, "logit_bias applies within the grammar"
    assert list(infer.complete(engine, requests[1:])) == others


def test_unknown_types_are_refused() -> None:
    with pytest.raises(UserError, match="foo"):
        grammar.from_json_schema({"type": "foo"})
