"""Arithmetic: sums, differences and products of two numbers, answered through the python tool; needs no download.

    What is 37+85?  ->  Let me calculate: <|python_start|>37+85<|python_end|><|output_start|>122<|output_end|>

                        #### 122

What a call holds stands in the question, so a small model has to learn what to copy, not how to calculate. Whether a
problem trains or tests is decided by a hash of its two operands in either order: none is in both splits, not as another
operation either.
"""

import hashlib
import random
from pathlib import Path

from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks import _generated
from nanochat.tasks.task import Task, match_final_number, qa_conversation

TEST_SHARE = 8
"""One pair of operands of so many tests."""
PHRASINGS = {
    "+": ("{a}+{b}", "{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}"),
    "-": ("{a}-{b}", "{a} - {b}", "{a} minus {b}", "the difference of {a} and {b}"),
    "*": ("{a}*{b}", "{a} * {b}", "{a} times {b}", "the product of {a} and {b}"),
}
QUESTIONS = ("What is {}?", "How much is {}?", "Calculate {}.", "Compute {}", "what is {}")
BARE = ("{}", "{}=", "{} = ?")  # without a word


def load(
    split: str = "train",
    *,
    source: str | Path | None = None,
    size: int | None = None,
    digits: int = 3,
    product_digits: int = 2,
) -> Task:
    """Return the task.

    Args:
        split: train or test. source: does not matter, there is nothing to read.
        size: number of rows; None: 20,000 to train, 256 to test.
        digits: of the operands of sums and differences at most. product_digits: of those of products.

    Raises:
        UserError: there is no such split, or a number makes no sense.
    """
    seed, rows = _generated.first_seed("arithmetic", split), _generated.rows("arithmetic", split, size, train=20_000)
    if min(digits, product_digits) < 1:
        raise UserError(f"task arithmetic: digits={digits}, product_digits={product_digits}: expected 1 or more")

    def row(index: int) -> Conversation:
        rng = random.Random(seed + rows[index])
        return problem(rng, split == "test", digits, product_digits)

    return Task("arithmetic", "generative", len(rows), row, match_final_number)


def problem(rng: random.Random, test: bool, digits: int, product_digits: int) -> Conversation:
    """Return a problem of the test or the training set, its answer included."""
    operation = rng.choice("+-*")
    longest = product_digits if operation == "*" else digits
    a, b = _operands(rng, longest)
    while held_out(a, b) != test:
        a, b = _operands(rng, longest)
    if operation == "-" and rng.random() < 0.75:  # a negative difference now and then
        a, b = max(a, b), min(a, b)
    asked = rng.choice(PHRASINGS[operation]).format(a=a, b=b)
    result = str({"+": a + b, "-": a - b, "*": a * b}[operation])
    parts = [
        {"type": "text", "text": "Let me calculate: "},
        {"type": "python", "text": f"{a}{operation}{b}"},
        {"type": "python_output", "text": result},
        {"type": "text", "text": f"\n\n#### {result}"},
    ]
    return qa_conversation(rng.choice(QUESTIONS + BARE * asked[0].isdigit()).format(asked), parts)


def held_out(a: int, b: int) -> bool:
    """Tell whether problems with these operands, in either order, test."""
    return hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()[0] % TEST_SHARE == 0


def _operands(rng: random.Random, digits: int) -> tuple[int, int]:
    """Return two numbers of one to `digits` digits, each length as likely as another."""
    lengths = rng.randint(1, digits), rng.randint(1, digits)
    a, b = (rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length) for length in lengths)
    return a, b
