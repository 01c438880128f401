"""Tasks: what a model is fine-tuned on and examined by, as rows of conversations that are made when they are asked for.

A task is a number of rows and a function from an index to a conversation, whose last message is the reference answer.
Slices and mixtures are tasks again: they hold indices, and copy nothing. `nanochat.tasks` has the tasks themselves.

The tasks, one module each: `load(split, *, source=None, **options) -> Task`. A copied file is a new task.

    from nanochat import tasks
    tasks.load("gsm8k", "test").row(0)
    tasks.from_text("mmlu:auxiliary_train")

Tasks of the hub are read with `datasets`; `source` is a file or a folder of theirs to be read instead, and a folder may
hold those of many tasks (`nanochat.tasks._table`). Tasks that are generated, or ship with the package, look into the
folder too, and need nothing there.
"""

import bisect
import dataclasses
import importlib
import inspect
import itertools
import random
import re
import typing
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from nanochat.config import UserError, nearest, parse
from nanochat.data import Conversation, Tokenizer

FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows to learn from or to be examined by.

    Attributes:
        name: as `nanochat.tasks` knows it.
        kind: choice (the answer is one of the row's "letters"), generative (`right` judges a written answer), or chat
            (there is nothing to be right about).
        size: number of rows.
        row: index -> {"messages": […]}, the last message being the reference answer. A choice row has "letters" too.
            An index beyond the size raises IndexError; a row of the data that is damaged, UserError.
        right: (row, answer as plain text) -> is it right? None unless the task is generative.
        baseline: accuracy of guessing, 0 to 1.
    """

    name: str
    kind: Literal["choice", "generative", "chat"]
    size: int
    row: Callable[[int], Conversation]
    right: Callable[[Conversation, str], bool] | None = None
    baseline: float = 0.0


def slice_task(task: Task, start: int | None = 0, stop: int | None = None, step: int | None = 1) -> Task:
    """Return the slice `task[start:stop:step]`, with Python's rules for slices.

    Raises:
        ValueError: the step is 0.
    """
    indices = range(task.size)[start:stop:step]
    return dataclasses.replace(task, size=len(indices), row=lambda index: task.row(indices[index]))


def mixture(tasks: Sequence[Task], seed: int = 42, name: str = "mixture") -> Task:
    """Return all rows of all tasks in the order of `random.Random(seed).shuffle`; a task named twice counts twice.

    Args:
        tasks: in an order that matters to the shuffle.

    Returns:
        A task of kind chat: its rows are to learn from, and are not judged.

    Raises:
        ValueError: there is no task.
    Source: spec/data.md, "Tasks".
    """
    if not tasks:
        raise ValueError("a mixture needs a task at least")
    ends = list(itertools.accumulate(task.size for task in tasks))
    order = array("q", range(ends[-1]))  # pairs (task, row) one task after the other, counted through
    random.Random(seed).shuffle(order)

    def row(index: int) -> Conversation:
        pair = order[range(len(order))[index]]
        which = bisect.bisect_right(ends, pair)
        return tasks[which].row(pair - ends[which] + tasks[which].size)

    return Task(name, "chat", len(order), row)


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Return a question with its choices as a user's message.

    A letter stands behind its choice and directly behind the `=`, which small models find easier, and so that it is the
    same token there as in the answer.

    Raises:
        ValueError: there are not as many letters as choices.
    Source: spec/data.md, "Tasks".
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def letter_ids(tokenizer: Tokenizer, letters: Sequence[str]) -> list[int]:
    """Return the token of each letter, as an answer and as `multiple_choice` shows it.

    Raises:
        UserError: the tokenizer has no token of its own for one, or another one behind the `=`.
    """
    ids = []
    for letter in letters:
        answer, shown = tokenizer.encode(letter), tokenizer.encode(f"- x={letter}\n- x")
        if len(answer) != 1 or answer[0] not in shown:
            raise UserError(
                f"the tokenizer does not keep the letter {letter!r} of a choice as one token in question and answer: "
                "train it on text with fewer lists of choices"
            )
        ids += answer
    return ids


def final_answer(text: str) -> str | None:
    """Return the number behind the first `#### ` without the commas in it, or None where there is none.

    Source: spec/data.md; the convention is GSM8K's (arXiv 2110.14168).
    """
    found = FINAL_ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def match_final_number(row: Conversation, answer: str) -> bool:
    """Tell whether an answer ends in the number of the row's reference answer; a `Task.right` for such tasks."""
    found = final_answer(answer)
    return found is not None and found == final_answer(plain_text(row["messages"][-1]["content"]))


def plain_text(content: str | Sequence[dict[str, str]]) -> str:
    """Return what an assistant says in a message, its tool calls and their results left out."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def qa_conversation(question: str, answer: str | list[dict[str, str]]) -> Conversation:
    """Return the conversation of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(
        path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem not in ("task", "hub_table")
    )


def load(name: str, split: str = "train", *, source: str | Path | None = None, **options: Any) -> Task:
    """Return a task.

    Args:
        name: one of `names()`. split: train or test, or as the task's data set calls it.
        source: a file or folder that is read instead of the hub. options: the task's own.

    Raises:
        UserError: there is no such task, split or option, or the data cannot be had or is not of the right form.
    """
    options_of(name, options)
    return _module(name).load(split, source=source, **options)


def from_text(text: str, split: str = "train", *, source: str | Path | None = None, **options: Any) -> Task:
    """Return the task that a setting names: its name, then any of split, source and options, with colons between.

        gsm8k    mmlu:auxiliary_train    customjson:/path/file.jsonl    arithmetic:test:size=200

    What has a `=` is an option; what has a slash, or ends in .jsonl or .parquet, a source; all else a split.

    Args:
        text: what stands in it goes before the other arguments.

    Raises:
        UserError: as for `load`, and where a word does not parse.
    """
    name, *words = text.strip().split(":")
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if "/" in word or word.endswith((".jsonl", ".json", ".parquet")):
            source = word
        elif equals:
            given[key] = value
        else:
            split = word
    kinds = options_of(name, given)
    for key, value in given.items():
        try:
            options[key] = parse(value, kinds[key])
        except ValueError as error:
            raise UserError(f"task {text}: {key}={value}: {error}") from None
    return load(name, split, source=source, **options)


def about(name: str) -> str:
    """Return what a task is, in a line. Raises: UserError: there is no such task."""
    return (inspect.getdoc(_module(name)) or "").partition("\n")[0].partition(": ")[2].rstrip(".")


def options_of(name: str, given: typing.Iterable[str] = ()) -> dict[str, Any]:
    """Return the options of a task, name -> annotation.

    Raises:
        UserError: there is no such task, or one of `given` is no option of it.
    """
    function = _module(name).load
    kinds = typing.get_type_hints(function)
    options = {key: kinds[key] for key in inspect.signature(function).parameters if key not in ("split", "source")}
    for key in given:
        if key not in options:
            raise UserError(f"task {name} has no option {key}{nearest(key, options)}")
    return options


def _module(name: str) -> Any:
    if name not in names():
        raise UserError(f"{name!r}: no such task{nearest(name, names())}")
    return importlib.import_module(f"nanochat.tasks.{name}")
