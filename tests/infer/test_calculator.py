"""Calculator: exact values inside its grammar, nothing outside of it, in bounded time, in any thread."""

import random
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from nanochat.infer import calculate, tool_use
from nanochat.tasks import gsm8k

FUZZ_STRINGS = 100_000
LIMIT_SECONDS = 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000*2", "2000"),
        ("1,234,567.5 + 1", "1234568.5"),
        ("7/2", "3.5"),
        ("  2 * 3\n", "6"),
        ("'strawberry'.count('r')", "3"),
        ("\"it's, so\".count('s')", "2"),
        ("'a,b,c' . count( ',' )", "2"),
        ("'abc'.count('')", "4"),
        ("'ünï'.count('ï')", "1"),
        ("'__import__(\"os\")'.count('o')", "2"),
    ],
)
def test_values(text: str, expected: str) -> None:
    assert calculate(text) == expected


# As GSM8K writes results. The reference has Python's: 5.0, 63.00000000000001, 0.30000000000000004, 1e-06 and so on.
LESSONS = """<<10/2=5>> <<80*.05=4>> <<5.0*2=10>> <<70*.01*90=63>> <<2.8*700=1960>> <<11/15*300=220>> <<18.10-7.10=11>>
<<0.1+0.2=0.3>> <<2.4/12=0.2>> <<80-78.2=1.8>> <<2+2+2+1/3+1/3+1/3=7>> <<1/8=0.125>> <<1/3=0.3333333333333333>>
<<2/3=0.6666666666666666>> <<1/1000000=0.000001>> <<1/4000000*2=0.0000005>> <<0*-1=0>> <<-0.0=0>> <<1-1.0=0>>
<<7.0=7>> <<3000000*1000000.0*10000=30000000000000000>> <<-9/2=-4.5>> <<-9/3=-3>> <<1,800*1.5=2700>>"""


@pytest.mark.parametrize(("text", "expected"), re.findall("<<(.*)=(.*)>>", LESSONS.replace(" ", "\n")))
def test_results_are_written_as_in_the_lessons(text: str, expected: str) -> None:
    assert calculate(text) == expected
    call, output = gsm8k.parse_answer(f"<<{text}={expected}>>")
    assert calculate(call["text"]) == output["text"]


NO_RESULT = [
    *("", " ", ".", "...", "()", "1,2", "1,0000", "1234,567", "1,000,00", "(1,000,)", "1;2", "1\n+2", "1 2", "01"),
    *("2**3", "9**9**9", "10**10**10", "7//2", "7%2", "1e5", "1_000", "0x10", "1j", "1<2", "~1", "1@2", "3(4)"),
    *("x", "True", "None", "abs(-1)", "print(1)", "(1).real", "1 .real", "[1][0]", "{}", "{1:2}[1]", "lambda: 1"),
    *("1if 1else 2", "0or 1", "await x", "(yield)", "a:=1", "*1", "**1", "[x for x in range(10**9)]", "exec('1')"),
    *("'a'", "'a'*3", "'a'*10**9", "'a'+'b'", "'a'.join('b')", "'%s'.format(1)", "f'{9**9**9}'", "f'{1}'.count('1')"),
    *("'a'.count", "'a'.count()", "'a'.count('a', 1)", "'a'.upper()", "'a'.count(1)", "b'a'.count(b'a')"),
    *("'a'.count(x)", "'a'.count(sub='a')", "'a'.count('a').real", "'a'.count('a')+1", r"'\d'.count('d')"),
    *("__import__('os').system('true')", "open('/etc/passwd').read()", "'a'.__class__", "'a'.count('a').__class__"),
    *("().__class__.__bases__", "().__class__.__mro__[1].__subclasses__()"),
    *("1/0", "1/(1-1)", "0/0", "1.0/0", "9" * 200, "1" * 400 + ".0", "1" * 400 + "/3.5", "9" * 400 + "/7"),
    f"1/({'9' * 200}.0*{'9' * 200}.0)",  # 0.0 by way of infinity
    *("(" * 250, "(" * 250 + "1" + ")" * 250, "-" * 999 + "1", "1" + "+1" * 499, "1" * 5000),
    *("１+１", "٣+1", "2×3", "1\x0c+1", "1\0", "\ud800", "'\ud800'.count('a')", "'a\0'.count('a')", "\ufeff1+1"),
]


@pytest.mark.parametrize("text", NO_RESULT)
def test_no_result(text: str) -> None:
    assert calculate(text) is None


def random_expression(rng: random.Random, depth: int) -> str:
    """Return a valid expression, without commas, so that Python reads it as we do."""
    kind = rng.random()
    if depth == 0 or kind < 0.2:
        whole = str(rng.choice([rng.randrange(10), rng.randrange(10**4), rng.randrange(10**18)]))
        return rng.choice([whole, whole, f"{whole}.{rng.randrange(1000)}", f"{whole}.", f".{rng.randrange(1000)}"])
    if kind < 0.3:
        return rng.choice("+-") + random_expression(rng, depth - 1)
    if kind < 0.5:
        return f"({random_expression(rng, depth - 1)})"
    space = rng.choice(["", " "])
    parts = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    return f"{parts[0]}{space}{rng.choice('+-*/')}{space}{parts[1]}"


def exact_value(text: str) -> str | None:
    """Return the value in fractions, which is rounded to a float at the end if it is not whole."""
    fractions = re.sub(r"\d+\.\d*|\.\d+|\d+", lambda n: f"F({float(n[0]) if '.' in n[0] else n[0]!r})", text)
    try:
        value = eval(
            fractions if text[:1] not in "'\"" else text, {"__builtins__": {}, "F": lambda x: Fraction(str(x))}
        )
        whole = value.denominator == 1
        result = str(value.numerator) if whole else f"{Decimal(repr(float(value))).normalize():f}"
    except (ArithmeticError, ValueError):
        return None
    return result if len(result) <= tool_use.MAX_RESULT_CHARACTERS and (whole or Fraction(result)) else None


def test_equals_exact_fractions_on_valid_expressions() -> None:
    rng = random.Random(0)
    results = 0
    for _ in range(5000):
        text = random_expression(rng, rng.randrange(7))
        if len(text) <= tool_use.MAX_CHARACTERS and sum(map(text.count, "+-*/(")) <= tool_use.MAX_OPERATORS:
            expected = exact_value(text)
            assert calculate(text) == expected, text
            results += expected is not None
    assert results > 4000


ALPHABET = "0123456789+-*/()., "
COUNTS = ["'strawberry'.count('r')", '"a b".count("")', "'abcabc'.count('b')"]


def random_unicode(rng: random.Random) -> str:
    top = rng.choice([0x80, 0x100, 0x3000, 0x110000])
    return "".join(chr(rng.randrange(top)) for _ in range(rng.randrange(60)))


def mutated(rng: random.Random) -> str:
    text = rng.choice([random_expression(rng, 4), rng.choice(NO_RESULT), "1,000*(2+3)", rng.choice(COUNTS)])
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        characters = [rng.choice(ALPHABET), chr(rng.randrange(128)), chr(rng.randrange(0x3000))]
        new = rng.choice([*characters, rng.choice(NO_RESULT), ""])
        text = text[:at] + new + text[at + rng.randrange(3) :]
    return text


def deep(rng: random.Random) -> str:
    n = rng.choice([10, 50, 99, 150, 199, 300, 10_000])
    a, b = rng.choice([("(", ")"), ("-", ""), ("+-", ""), ("(-", ")"), ("1+", ""), ("2*(1+", ")"), ("'a'.count(", ")")])
    return a * n + rng.choice(["1", "1.5", "", "x"]) + b * rng.choice([n, n, n - 1])


def thousands(rng: random.Random) -> str:
    a, b = (rng.randrange(10 ** rng.randrange(1, 15)) for _ in range(2))
    return f"{a:,} {rng.choice('+-*')} ({b:,})"


def huge(rng: random.Random) -> str:
    numbers = ["9" * rng.choice([5, 50, 300, 900, 5000, 10**5]) + rng.choice(["", ".", ".0", ",000"]) for _ in range(2)]
    return rng.choice("+-*/").join(numbers)


KINDS: list[Callable[[random.Random], str]] = [
    random_unicode,
    lambda rng: "".join(rng.choices(ALPHABET, k=rng.randrange(1, 30))),
    lambda rng: "".join(rng.choices(ALPHABET + "'\"count", k=rng.randrange(1, 60))),
    mutated,
    mutated,
    lambda rng: random_expression(rng, 7),
    deep,
    thousands,
    huge,
]


def timed(text: str) -> tuple[str | None, float]:
    started = time.thread_time()  # what other processes take does not count
    return calculate(text), time.thread_time() - started


@pytest.mark.slow
def test_fuzzed_expressions_never_raise_warn_or_take_long() -> None:
    rng = random.Random(3)
    slowest, results = (0.0, ""), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning of the parser would reach the user's terminal
        for number in range(FUZZ_STRINGS):
            text = KINDS[number % len(KINDS)](rng)
            result, seconds = timed(text)
            if seconds > LIMIT_SECONDS / 2:  # the garbage collector's turn, most likely: it would not come again
                seconds = min(timed(text)[1] for _ in range(3))
            slowest = max(slowest, (seconds, text))
            if result is not None:
                results += 1
                bare = text.strip()
                arithmetic = set(bare) <= set(ALPHABET + "\t")
                assert arithmetic or (bare[0] in "'\"" and "count" in bare), text
                assert "**" not in text or not arithmetic, text
                assert result == exact_value(bare.replace(",", "") if arithmetic else bare), text
    assert slowest[0] < LIMIT_SECONDS, slowest
    assert FUZZ_STRINGS * 0.1 < results < FUZZ_STRINGS * 0.9


def test_calculator_works_at_any_stack_depth() -> None:
    text = "1" + "+1" * 99

    def at_the_bottom() -> set[str | None]:
        try:
            return {*at_the_bottom(), calculate(text)}
        except RecursionError:
            return set()

    results = at_the_bottom()  # from where the stack ends up to here: a value or none, never an error
    assert "100" in results and results <= {"100", None}


@pytest.mark.parametrize(("text", "code", "shown"), [("1,000 * 2", 0, "2000\n"), ("1/0", 1, "no result\n")])
def test_command_line(text: str, code: int, shown: str) -> None:
    command = [sys.executable, "-m", "nanochat.infer.tool_use", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (code, shown)
