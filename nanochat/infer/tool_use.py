"""The calculator that a chat model calls between its tool markers: arithmetic, and counting letters in a text.

    expression = term of numbers with + - * / ( ), unary signs, and commas between thousands: (1,000 - 1) * 2.5
               | 'text'.count('x'), with plain string literals

The text comes from a model, so nothing in it is run: it has to pass a pattern of the characters that may occur, is
parsed with `ast`, and only the nodes of this grammar have a meaning. Length, nesting and result are bounded, so the
time is too (well below a millisecond), without a signal or a thread. No power: `9**9**9` would not end.

What a row of generated tokens goes through: sampled text, tool calls whose results are forced, and its end.

Pure functions over a small state, for one row. Between <|python_start|> and <|python_end|> the sampled tokens are an
expression; where the calculator gives it a value, <|output_start|>, the tokens of the value and <|output_end|> are
forced into the row before it is sampled from again. Source: the spec's "Engine".
"""

import ast
import math
import operator
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from nanochat.data import Tokenizer

MAX_CHARACTERS = 1000
"""Longest expression."""
MAX_OPERATORS = 200
"""Operators and parentheses in one expression; bounds how deep the tree can be."""
MAX_RESULT_CHARACTERS = 100
"""Longest result; what a model reads back token by token."""

_ARITHMETIC = re.compile(r"[0-9.,+\-*/() \t]+")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
# A backslash is left out: what an escape means is not worth a warning from the parser.
_LITERAL = r"(?:'[^'\\\r\n\0]*'|\"[^\"\\\r\n\0]*\")"
_COUNT = re.compile(rf"{_LITERAL}[ \t]*\.[ \t]*count[ \t]*\([ \t]*{_LITERAL}[ \t]*\)")

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class _NoResult(Exception):
    """The expression is outside of the grammar, or a value on the way is not a finite number."""


def calculate(text: str) -> str | None:
    """Return what Python's `str` gives for the value of the expression, or None where there is none.

    Args:
        text: the expression, as a model wrote it; spaces around it do not matter.

    Returns:
        `"2000"` for `1,000*2`, `"3.5"` for `7/2`, `"3"` for `'strawberry'.count('r')`. None: not in the grammar, a
        division by zero, a value that is not finite, or one of the bounds above is passed. Never raises.

    Source: spec/serving.md, "Engine".
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.strip(" \t\r\n")
    try:
        if _ARITHMETIC.fullmatch(text):
            value = _arithmetic(text)
        elif _COUNT.fullmatch(text):
            value = _count(text)
        else:
            return None
        result = str(value)
    # The parser's own answers to a text that is no expression, to a lone surrogate, and to a caller that has used up
    # the stack; then what arithmetic can answer.
    except (SyntaxError, ValueError, RecursionError, MemoryError, ArithmeticError, _NoResult):
        return None
    return result if len(result) <= MAX_RESULT_CHARACTERS else None


def _arithmetic(text: str) -> float:
    if sum(map(text.count, "+-*/(")) > MAX_OPERATORS:
        raise _NoResult
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    if "," in text:
        raise _NoResult
    return _value(ast.parse(text, mode="eval").body)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            result = value
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            result = _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op, operand) if type(op) in _UNARY:
            result = _UNARY[type(op)](_value(operand))
        case _:
            raise _NoResult
    # An int of any size is finite; asking `math` would turn it into a float, which can overflow.
    if isinstance(result, float) and not math.isfinite(result):
        raise _NoResult
    return result


def _count(text: str) -> int:
    match ast.parse(text, mode="eval").body:
        case ast.Call(ast.Attribute(ast.Constant(value=str(where)), "count"), [ast.Constant(value=str(what))], []):
            return where.count(what)
    raise _NoResult


if __name__ == "__main__":
    answer = calculate(" ".join(sys.argv[1:]))
    print("no result" if answer is None else answer)
    sys.exit(answer is None)


Evaluate = Callable[[str], str | None]


class ToolTokens(NamedTuple):
    """The ids that mean something to a row, and how an expression is evaluated.

    `stops` end a row; after one of `pauses` the next token is not known before `advance` has seen it.
    """

    stops: frozenset[int]
    call_start: int
    call_end: int
    output_start: int
    output_end: int
    tokenizer: Tokenizer
    evaluate: Evaluate = calculate

    @property
    def pauses(self) -> tuple[int, ...]:
        """Ids after which a row waits for its caller."""
        return (*sorted(self.stops), self.call_end)


def tool_tokens(tokenizer: Tokenizer, evaluate: Evaluate = calculate) -> ToolTokens:
    """Return the rules of a tokenizer's special tokens."""
    name = tokenizer.special
    stops = frozenset((name("<|assistant_end|>"), tokenizer.bos))
    call = name("<|python_start|>"), name("<|python_end|>")
    return ToolTokens(stops, *call, name("<|output_start|>"), name("<|output_end|>"), tokenizer, evaluate)


def advance(
    rules: ToolTokens, call: tuple[int, ...] | None, token: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
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
