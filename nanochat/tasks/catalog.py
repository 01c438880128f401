"""Tasks by name. To add one, copy the file of a similar task and list its function in `TASKS`."""

import inspect
import itertools
import os
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat.config import UserError, nearest, parse
from nanochat.tasks import arithmetic, conversations, gsm8k, humaneval, multiple_choice, spelling
from nanochat.tasks.task import Task, slice_task

TASKS: dict[str, Callable[..., Task]] = {
    "arc_challenge": multiple_choice.arc_challenge,
    "arc_easy": multiple_choice.arc_easy,
    "arithmetic": arithmetic.arithmetic,
    "customjson": conversations.customjson,
    "gsm8k": gsm8k.gsm8k,
    "humaneval": humaneval.humaneval,
    "identity": conversations.identity,
    "mmlu": multiple_choice.mmlu,
    "simplespelling": spelling.simplespelling,
    "smoltalk": conversations.smoltalk,
    "spellingbee": spelling.spellingbee,
}


def names() -> list[str]:
    """Return the names of all tasks."""
    return list(TASKS)


def load(
    name: str,
    split: str = "train",
    *,
    source: str | Path | None = None,
    start: int | None = None,
    stop: int | None = None,
    **options: Any,
) -> Task:
    """Return the task `name`, or its rows `[start:stop]` with Python's rules for slices.

    Args:
        split: train, test, or another split of the task's data set.
        source: a local file or folder to read in place of the hub. A folder may hold the files of many tasks.
        options: the task's own, see `options_of`.
    """
    options_of(name, options)
    task = TASKS[name](split, source=source, **options)
    part = slice_task(task, start, stop)
    if task.size and not part.size:
        raise UserError(f"task {name}: start={start}, stop={stop}: contains none of the {task.size:,} rows")
    return part


def from_text(text: str, split: str = "train", *, source: str | Path | None = None, **options: Any) -> Task:
    """Return the task that a setting names: its name, then any of split, source and options, separated by colons.

        gsm8k    mmlu:auxiliary_train    customjson:/path/file.jsonl    arithmetic:test:size=200    mmlu:test:stop=5200

    They override the other arguments. A word with a slash or a suffix is a source; a word with `=` an option; any other
    word a split. A source may contain colons: with the words around it, it is the longest path that exists.
    """
    name, path, words = split_text(text)
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            values[key] = value
        else:
            split = word
    annotations = options_of(name, values)
    for key, value in values.items():
        try:
            options[key] = parse(value, annotations[key])
        except ValueError as error:
            raise UserError(f"task {text}: {key}={value}: {error}") from None
    return load(name, split, source=path or source, **options)


def split_text(text: str) -> tuple[str, str | None, list[str]]:
    """Return (name of the task, its source or None, its other words) of a text as in `from_text`."""
    name, *words = text.strip().split(":")
    inside = [n for n, word in enumerate(words) if "/" in word or os.path.splitext(word)[1][1:2].isalpha()]
    start, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
    for span in itertools.product(range(start + 1), range(len(words), end - 1, -1)) if inside else ():
        if os.path.exists(os.path.expanduser(":".join(words[slice(*span)]))):
            start, end = span
            break
    return name, ":".join(words[start:end]) or None, words[:start] + words[end:]


def about(name: str) -> str:
    """Return a task's description in one line."""
    return (inspect.getdoc(TASKS[name]) or "").partition("\n")[0].partition(": ")[2].rstrip(".")


def options_of(name: str, given: Iterable[str] = ()) -> dict[str, Any]:
    """Return a task's options as name -> annotation; all of `given` have to be among them."""
    if name not in TASKS:
        hint = r"; a comma within a path is written \," if {".", "/"} & set(name) else nearest(name, TASKS)
        raise UserError(f"{name!r}: no such task{hint}")
    annotations = typing.get_type_hints(TASKS[name]) | {"start": int | None, "stop": int | None}
    options = {key: kind for key, kind in annotations.items() if key not in ("split", "source", "return")}
    for key in given:
        if key not in options:
            raise UserError(f"task {name} has no option {key}{nearest(key, options)}")
    return options
