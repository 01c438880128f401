"""HumanEval: the program in an answer, however it is written down; and answers that stay wrong."""

import textwrap

import pytest

from nanochat import tasks
from nanochat.tasks import humaneval

PROMPT = '''import math


def mile() -> float:
    return 1.852


def knots(kmh: float) -> float:
    """ Convert.
    >>> knots(18.52)
    10.0
    """
'''
TESTS = "def check(f):\n    assert abs(f(18.52) - 10) < 1e-9\n"
CODE = "def knots(kmh):\n    return kmh / 1.852"
BODY = "    if kmh:\n        return kmh / mile()\n    return 0"
ZERO = "def knots(kmh):\n    return 0"
PROSE = "This works because it's the length (see above.\nEnjoy"


def solves(answer: str) -> bool:
    row = {**tasks.qa_conversation(PROMPT, ""), "entry_point": "knots", "test": TESTS}
    try:
        exec(compile(humaneval.program(row, answer), "program", "exec"), {"__name__": "__main__"})
    except (Exception, SystemExit):
        return False
    return True


def block(code: str = CODE, language: str = "python", fence: str = "```") -> str:
    return f"{fence}{language}\n{code}\n{fence}"


FENCES = {
    **{
        f"word {word!r}": block(language=word)
        for word in ("", "Python", "PY", "python3.11", " {.python}", "py title=a")
    },
    "tildes": f"Sure:\n~~~~ python  \n{CODE}\n~~~~\t\n{PROSE}",
    "longer closing fence": f"```python\n{CODE}\n`````\n{PROSE}",
    "unclosed": f"Here:\n```python\n{CODE}",
    "closed behind the code": f"```python\n{CODE}```\n{PROSE}",
    "after other text": f"The code is ```python\n{CODE}\n```",
    "Windows line ends": f"Sure\n\n{block()}\nDone.".replace("\n", "\r\n"),
    "in a list": f"1. Write:\n\n{textwrap.indent(block(), '    ')}\n\n2. Run it.",
    "in a quote": textwrap.indent(block(), "> "),
    "fence in its docstring": block(
        'def knots(kmh):\n    """\n    ```\n    x\n    ```\n    """\n    return kmh / 1.852'
    ),
    "after a shell fence": f"{block('pip install x', 'sh')}\n{block()}",
    "after an output and a JSON fence": f"{block('10.0', 'text')}\n{block(chr(123) + '}', 'json')}\n{block()}",
    "before its use": f"{block()}\n{block('print(knots())')}",
    "after its use": f"{block('print(knots())')}\n{block()}",
    "after the repeated prompt": f"{block(PROMPT)}\n{block()}",
    "helper in a block of its own": f"{block('import cmath')}\n{block('def k(): return cmath.pi')}\n"
    + block("def knots(kmh):\n    return kmh / 1.852 + 0 * k()"),
    "before another version": f"{block()}\n{block(ZERO)}",
    "after thoughts": f"<think>{block(ZERO)}</think>{block()}",
}
OTHERS = {
    "prose around it": f"Here is the function:\n\n{CODE}\n\n{PROSE}",
    "prose that begins like code": f"If you want this, import it.\n\nMILE = 1.852\n\n{CODE}\n\nComplexity: linear",
    "indented code": f"Here it is:\n\n{textwrap.indent(CODE, '    ')}\n\n{PROSE}",
    "examples after it": f"{CODE}\n\n>>> knots(18.52)\n10.0\n\n```\nmore\n```",
    "examples as the code": block(">>> def knots(kmh):\n...     return kmh / 1.852\n...\n>>> knots(18.52)\n10.0"),
    "inline code": "Use `def knots`:\n`def knots(kmh): return kmh / 1.852`",
    "helper and imports of the prompt": block("def knots(kmh):\n    return math.fabs(kmh / mile())"),
    "assigned": block("knots = lambda kmh: kmh / 1.852"),
    "future import": block(f"from __future__ import annotations\n\n{CODE}"),
    "future import below": block(f'"""Units."""\nfrom __future__ import (annotations,\n    division)\n\n{CODE}'),
    "main block": block(f'{CODE}\n\nif __name__ == "__main__":\n    print(knots(float(input())))'),
    "unfinished end": f"{CODE}\n\ndef main():\n    print(knots(",
    "only the body": BODY,
    "only the body, without its first spaces": BODY.strip(),
    "only the body, as a block": f"Sure:\n{block(textwrap.dedent(BODY))}\n{PROSE}",
    "only the body, with tabs": BODY.replace("    ", "\t"),
    "only the body, then more": f'{BODY}\n\n\ndef other():\n    """ unfinished',
    "prompt and body as two blocks": f"{block(PROMPT)}\n{block(BODY)}",
}


@pytest.mark.parametrize("answer", (FENCES | OTHERS).values(), ids=(FENCES | OTHERS).keys())
def test_right_answer_solves_the_problem(answer: str) -> None:
    assert solves(answer)
    assert not solves(answer.replace("1.852", "1.851").replace("mile()", "1.851"))


WRONG = {
    "nothing": "",
    "prose": "I would divide by 1.852.",
    "prompt": PROMPT,
    "tests": block(TESTS),
    "no tests": block("def check(f):\n    pass\n\ndef knots(kmh):\n    return 0"),
    "exit": "import sys\nsys.exit(0)",
    "exit inside": "def knots(kmh):\n    raise SystemExit(0)",
    "method": block("class Units:\n    def knots(self, kmh):\n        return kmh / 1.852"),
    "other name": CODE.replace("knots", "knot"),
    "comment": textwrap.indent(CODE, "# "),
    "error inside": f"{CODE}\n    prin(",
    "error inside, then prose": block(f"{CODE}\n  x = 1\n") + PROSE,
    "wrong before right": f"{block(ZERO)}\n{block()}",
    "other language": block("function knots(k) { return k / 1.852 }", "js"),
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG.keys())
def test_wrong_answer_does_not(answer: str) -> None:
    assert not solves(answer)


def test_code_of_any_size_is_searched_in_time() -> None:
    for text in (
        "def f(:\n" * 500,
        "def f():\n  '''\n" + "x = 1\n" * 1000,
        "-" * 9000,
        "if x:\n" * 300,
        "(" * 5000,
        "\0",
        f"```\nx = {'1+' * 2000}1\n```\n{block(ZERO)}",
    ):
        assert not solves(text)
