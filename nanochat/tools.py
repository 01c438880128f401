"""What a row of generated tokens goes through: sampled text, tool calls whose results are forced, and its end.

Pure functions over a small state, for one row. Between <|python_start|> and <|python_end|> the sampled tokens are an
expression; where the calculator gives it a value, <|output_start|>, the tokens of the value and <|output_end|> are
forced into the row before it is sampled from again. Source: the spec's "Engine".
"""

from collections.abc import Callable
from typing import NamedTuple

from nanochat import calculator
from nanochat.tokenizer import Tokenizer

Evaluate = Callable[[str], str | None]


class Rules(NamedTuple):
    """The ids that mean something to a row, and how an expression is evaluated.

    `stops` end a row; after one of `pauses` the next token is not known before `advance` has seen it.
    """

    stops: frozenset[int]
    call_start: int
    call_end: int
    output_start: int
    output_end: int
    tokenizer: Tokenizer
    evaluate: Evaluate = calculator.evaluate

    @property
    def pauses(self) -> tuple[int, ...]:
        """Ids after which a row waits for its caller."""
        return (*sorted(self.stops), self.call_end)


def rules(tokenizer: Tokenizer, evaluate: Evaluate = calculator.evaluate) -> Rules:
    """Return the rules of a tokenizer's special tokens."""
    name = tokenizer.special
    stops = frozenset((name("<|assistant_end|>"), tokenizer.bos))
    call = name("<|python_start|>"), name("<|python_end|>")
    return Rules(stops, *call, name("<|output_start|>"), name("<|output_end|>"), tokenizer, evaluate)


def advance(rules: Rules, call: tuple[int, ...] | None, token: int) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Take one sampled token.

    Args:
        call: tokens of the call that is open, None where none is. token: what was sampled.

    Returns:
        (the call that is open now, tokens to force into the row).
    """
    if token == rules.call_start:
        return (), ()
    if call is None:
        return None, ()
    if token != rules.call_end:
        return (*call, token), ()
    result = rules.evaluate(rules.tokenizer.decode(call))
    if result is None:
        return None, ()
    return None, (rules.output_start, *rules.tokenizer.encode(result), rules.output_end)
