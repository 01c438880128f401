"""The `Task` type, its slices and mixtures, and what the tasks of this package share."""

import bisect
import contextlib
import dataclasses
import itertools
import random
import re
from array import array
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

from nanochat.config import UserError
from nanochat.data import Conversation

FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
SEPARATOR = re.compile(r"(?<=\d)(?:,|\{,\}|\\[,!]|['_\u00a0\u2009\u202f])(?=\d{3}(?!\d))")  # of thousands
NUMBER = re.compile(
    r"(?<![^\W_])(?<![.,/])([-−–]?)[$€£]?([-−–]?)(\.?\d[\d.,/]*(?:e[-+]?\d{1,3}(?!\w))?)", re.IGNORECASE
)
TEST_SEED = 10_000_000  # row i of a generated test split has the seed TEST_SEED + i; row i of a training split, i
TEST_ROWS = 256


class MissingDataError(UserError):
    """The data of a task is not here, and cannot be downloaded."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Conversations to train on or to evaluate with, made row by row on demand.

    Attributes:
        kind: multiple_choice (the answer is one of the row's "letters"), generative (`is_correct` checks a written
            answer), or chat (no answer is wrong).
        size: number of rows.
        row: index -> {"messages": [...]}; the last message is the reference answer. Raises IndexError beyond the size,
            UserError for a malformed row of the data.
        is_correct: (row, answer as plain text) -> bool; None unless the task is generative.
        baseline: accuracy of random guessing, 0 to 1.
    """

    name: str
    kind: Literal["multiple_choice", "generative", "chat"]
    size: int
    row: Callable[[int], Conversation]
    is_correct: Callable[[Conversation, str], bool] | None = None
    baseline: float = 0.0

    @property
    def is_correct_lenient(self) -> Callable[[Conversation, str], bool] | None:
        """As `is_correct`, however an answer is written, for a second score; None if there is no such check."""
        return match_any_number if self.is_correct is match_final_number else None


def slice_task(task: Task, start: int | None = 0, stop: int | None = None, step: int | None = 1) -> Task:
    """Return `task[start:stop:step]`, with Python's rules for slices."""
    indices = range(task.size)[start:stop:step]
    return dataclasses.replace(task, size=len(indices), row=lambda index: task.row(indices[index]))


def mixture(tasks: Sequence[Task], seed: int = 42, name: str = "mixture") -> Task:
    """Return all rows of all tasks, shuffled by `random.Random(seed)`, as a task of kind chat.

    A task that is listed twice counts twice. The order of the tasks matters to the shuffle.
    """
    if not tasks:
        raise ValueError("a mixture needs at least one task")
    ends = list(itertools.accumulate(task.size for task in tasks))
    order = array("q", range(ends[-1]))  # positions in the concatenation of all tasks
    random.Random(seed).shuffle(order)

    def row(index: int) -> Conversation:
        position = order[range(len(order))[index]]
        number = bisect.bisect_right(ends, position)
        return tasks[number].row(position - ends[number] + tasks[number].size)

    return Task(name, "chat", len(order), row)


def generated(
    name: str,
    split: str,
    size: int | None,
    *,
    train_rows: int,
    make_row: Callable[[random.Random], Conversation],
    is_correct: Callable[[Conversation, str], bool],
) -> Task:
    """Return a generative task whose rows are made by `make_row` from a random generator seeded by the row's index.

    Args:
        size: number of rows; None: `train_rows`, or TEST_ROWS of the test split.
    """
    if split not in ("train", "test"):
        raise UserError(f"task {name} has no split {split}; it has train and test")
    size = {"train": train_rows, "test": TEST_ROWS}[split] if size is None else size
    if not 1 <= size <= TEST_SEED:
        raise UserError(f"task {name}: size={size}: expected 1 to {TEST_SEED:,}")
    first_seed = TEST_SEED if split == "test" else 0
    seeds = range(first_seed, first_seed + size)
    return Task(name, "generative", size, lambda index: make_row(random.Random(seeds[index])), is_correct)


def data_file(name: str, source: str | Path | None) -> Path:
    """Return `source` if it is a file, or `name` in that folder; else the file `name` that ships with the package."""
    shipped = Path(__file__).parent / "data" / name
    if source is None:
        return shipped
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    return path / name if (path / name).exists() else shipped


def qa_conversation(question: str, answer: str | list[dict[str, str]]) -> Conversation:
    """Return a conversation of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def plain_text(content: str | Sequence[dict[str, str]]) -> str:
    """Return the text of an assistant's message without tool calls and their results."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def final_answer(text: str) -> str | None:
    """Return the number after the first `#### `, without commas; None if there is none (GSM8K's convention)."""
    match = FINAL_ANSWER.search(text)
    return match[1].replace(",", "") if match else None


def match_final_number(row: Conversation, answer: str) -> bool:
    """Return whether an answer gives the final number of the row's reference answer."""
    number = final_answer(answer)
    return number is not None and number == final_answer(plain_text(row["messages"][-1]["content"]))


def match_any_number(row: Conversation, answer: str) -> bool:
    """Return whether an answer gives the final number of the row's reference answer, in whatever form.

    It is the number after `####` or in \\boxed{}, else the last number. 18 is also 18., $18, 18.00, **18** or 36/2, and
    1800 is 1,800 or 1.8e3, compared exactly, as fractions; 1,80 and 1.8.0 are not numbers.

    Source: the filter flexible-extract of lm-evaluation-harness.
    """
    number = _last_number(answer)
    right = number is not None and number == _last_number(plain_text(row["messages"][-1]["content"]))
    return right or match_final_number(row, answer)


def _last_number(text: str) -> Fraction | None:
    text = SEPARATOR.sub("", text)
    after_marker = text.partition("####")[2] or text.rpartition("\\boxed{")[2] * ("\\boxed{" in text)
    match = NUMBER.search(after_marker) or next(reversed([*NUMBER.finditer(text)]), None)
    if match is None:
        return None
    sign = -1 if match[1] or match[2] else 1
    with contextlib.suppress(ValueError, ZeroDivisionError):  # 1,80 is not a number, nor is 4/0
        return sign * Fraction(match[3].rstrip(".,/"))
