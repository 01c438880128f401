"""Arithmetic, answered through the python tool.

    What is 37+85?  ->  Let me calculate: <|python_start|>37+85<|python_end|><|output_start|>122<|output_end|> #### 122

The call repeats the operands of the question, so a small model has to learn what to copy, not how to calculate.
"""

import hashlib
import random
from pathlib import Path

from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks.task import Task, generated, match_final_number, qa_conversation

TEST_FRACTION = 8  # one in eight pairs of operands is in the test split
PHRASINGS = {
    "+": ("{a}+{b}", "{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}"),
    "-": ("{a}-{b}", "{a} - {b}", "{a} minus {b}", "the difference of {a} and {b}"),
    "*": ("{a}*{b}", "{a} * {b}", "{a} times {b}", "the product of {a} and {b}"),
}
QUESTIONS = ("What is {}?", "How much is {}?", "Calculate {}.", "Compute {}", "what is {}")
BARE_QUESTIONS = ("{}", "{}=", "{} = ?")


def arithmetic(
    split: str = "train",
    *,
    source: str | Path | None = None,
    size: int | None = None,
    digits: int = 3,
    product_digits: int = 2,
) -> Task:
    """Arithmetic: sums, differences and products of two numbers, calculated by the tool; generated, no download.

    Args:
        source: ignored. size: number of rows; None: 20,000 of train, 256 of test.
        digits: at most, of the operands of sums and differences. product_digits: at most, of those of products.
    """
    if min(digits, product_digits) < 1:
        raise UserError(f"task arithmetic: digits={digits}, product_digits={product_digits}: expected 1 or more")

    def make_row(rng: random.Random) -> Conversation:
        operation = rng.choice("+-*")
        max_digits = product_digits if operation == "*" else digits
        a, b = _operands(rng, max_digits)
        while is_test_pair(a, b) != (split == "test"):
            a, b = _operands(rng, max_digits)
        if operation == "-" and rng.random() < 0.75:  # the others may have a negative difference
            a, b = max(a, b), min(a, b)
        problem = rng.choice(PHRASINGS[operation]).format(a=a, b=b)
        result = {"+": a + b, "-": a - b, "*": a * b}[operation]
        question = rng.choice(QUESTIONS + BARE_QUESTIONS * problem[0].isdigit()).format(problem)
        answer = [
            {"type": "text", "text": "Let me calculate: "},
            {"type": "python", "text": f"{a}{operation}{b}"},
            {"type": "python_output", "text": f"{result}"},
            {"type": "text", "text": f"\n\n#### {result}"},
        ]
        return qa_conversation(question, answer)

    return generated("arithmetic", split, size, train_rows=20_000, make_row=make_row, is_correct=match_final_number)


def is_test_pair(a: int, b: int) -> bool:
    """Return whether all problems with these operands, in either order, are in the test split: by their hash."""
    return hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()[0] % TEST_FRACTION == 0


def _operands(rng: random.Random, max_digits: int) -> tuple[int, int]:
    """Return two numbers of 1 to `max_digits` digits, each length equally likely."""
    lengths = rng.randint(1, max_digits), rng.randint(1, max_digits)
    a, b = (rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length) for length in lengths)
    return a, b
