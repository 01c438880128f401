"""Tool calls in generated tokens: the calculator, and the state machine of one row.

Between <|python_start|> and <|python_end|> the sampled tokens are an expression; if the calculator has a result,
<|output_start|>, the tokens of the result and <|output_end|> are forced into the row before it is sampled again.

    expression = numbers with + - * / ( ), unary signs, and commas between thousands: (1,000 - 1) * 2.5
               | 'text'.count('x'), with plain string literals

Results are written as GSM8K writes them, which the model is taught: 10/2 is 5 and 0.1+0.2 is 0.3. The reference writes
them as Python does, 5.0 and 0.30000000000000004 (its pull request 786): here we differ on purpose.

Model output is never executed: it has to match a pattern of allowed characters, is parsed with `ast`, and only the
nodes of this grammar are evaluated. Length, nesting and result are bounded, and so is the time: it has no powers.
"""

import ast
import math
import operator
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from nanochat.data import Tokenizer

MAX_CHARACTERS = 1000  # of an expression
MAX_OPERATORS = 200  # operators and parentheses of an expression, which bounds the depth of the tree
MAX_RESULT_CHARACTERS = 100

_ARITHMETIC = re.compile(r"[0-9.,+\-*/() \t]+")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
# No backslash: invalid escapes make the parser print warnings.
_LITERAL = r"(?:'[^'\\\r\n\0]*'|\"[^\"\\\r\n\0]*\")"
_COUNT = re.compile(rf"{_LITERAL}[ \t]*\.[ \t]*count[ \t]*\([ \t]*{_LITERAL}[ \t]*\)")

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str | None:
    """Return the value as text: "2000" for `1,000*2`, "3.5" for `7/2`, "3" for `'strawberry'.count('r')`.

    It is exact if it is whole, else rounded to the nearest float; it has no `.0` and no exponent. None if the
    expression is outside of the grammar or the limits, divides by zero, or is beyond the range of floats. Never raises.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    expression = expression.strip(" \t\r\n")
    try:
        if _ARITHMETIC.fullmatch(expression):
            result = _decimal_text(_arithmetic(expression))
        elif _COUNT.fullmatch(expression):
            result = str(_count(expression))
        else:
            return None
    # The parser raises on syntax, lone surrogates and callers near the end of their stack; the rest is arithmetic.
    except (SyntaxError, ValueError, RecursionError, MemoryError, ArithmeticError):
        return None
    return result if len(result) <= MAX_RESULT_CHARACTERS else None


def _arithmetic(expression: str) -> Fraction:
    if sum(map(expression.count, "+-*/(")) > MAX_OPERATORS:
        raise ValueError(expression)
    expression = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), expression)
    if "," in expression:
        raise ValueError(expression)
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value) if value < math.inf:
            return Fraction(str(value))
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op, operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
    raise ValueError("outside of the grammar")


def _decimal_text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    nearest = float(value)
    if not nearest:
        raise ValueError("beyond the range of floats")
    return f"{Decimal(str(nearest)).normalize():f}"


def _count(expression: str) -> int:
    match ast.parse(expression, mode="eval").body:
        case ast.Call(ast.Attribute(ast.Constant(value=str(text)), "count"), [ast.Constant(value=str(part))], []):
            return text.count(part)
    raise ValueError(expression)


class ToolTokens(NamedTuple):
    """Special tokens that matter to a row."""

    stops: frozenset[int]  # they end it
    call_start: int
    call_end: int
    output_start: int
    output_end: int
    tokenizer: Tokenizer

    @property
    def blocking(self) -> tuple[int, ...]:
        """Tokens after which the next one is not known before `step` has seen them."""
        return (*sorted(self.stops), self.call_end)


def tool_tokens(tokenizer: Tokenizer) -> ToolTokens:
    special = tokenizer.special
    stops = frozenset((special("<|assistant_end|>"), tokenizer.bos))
    call = special("<|python_start|>"), special("<|python_end|>")
    return ToolTokens(stops, *call, special("<|output_start|>"), special("<|output_end|>"), tokenizer)


def step(
    tools: ToolTokens, open_call: tuple[int, ...] | None, token: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Return (tokens of the call that is open after a sampled token, or None; tokens to force into the row)."""
    if token == tools.call_start:
        return (), ()
    if open_call is None:
        return None, ()
    if token != tools.call_end:
        return (*open_call, token), ()
    result = calculate(tools.tokenizer.decode(open_call))
    if result is None:
        return None, ()
    return None, (tools.output_start, *tools.tokenizer.encode(result), tools.output_end)


if __name__ == "__main__":
    answer = calculate(" ".join(sys.argv[1:]))
    print("no result" if answer is None else answer)
    sys.exit(answer is None)
