"""Tasks by name. To add one, copy the file of a similar task and list its function in `TASKS`."""

import inspect
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat.config import UserError, nearest, parse
from nanochat.tasks import arithmetic, conversations, gsm8k, humaneval, multiple_choice, spelling
from nanochat.tasks.task import Task

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


def load(name: str, split: str = "train", *, source: str | Path | None = None, **options: Any) -> Task:
    """Return the task `name`.

    Args:
        split: train, test, or another split of the task's data set.
        source: a local file or folder to read in place of the hub. A folder may hold the files of many tasks.
        options: the task's own, see `options_of`.
    """
    options_of(name, options)
    return TASKS[name](split, source=source, **options)


def from_text(text: str, split: str = "train", *, source: str | Path | None = None, **options: Any) -> Task:
    """Return the task that a setting names: its name, then any of split, source and options, separated by colons.

        gsm8k    mmlu:auxiliary_train    customjson:/path/file.jsonl    arithmetic:test:size=200

    A word with a slash, or ending in .jsonl, .json or .parquet, is a source; a word with `=` an option; any other word
    a split. They override the other arguments.
    """
    name, *words = text.strip().split(":")
    values: dict[str, str] = {}
    for word in words:
        if "/" in word or word.endswith((".jsonl", ".json", ".parquet")):
            source = word
        elif "=" in word:
            key, value = word.split("=", 1)
            values[key] = value
        else:
            split = word
    annotations = options_of(name, values)
    for key, value in values.items():
        try:
            options[key] = parse(value, annotations[key])
        except ValueError as error:
            raise UserError(f"task {text}: {key}={value}: {error}") from None
    return load(name, split, source=source, **options)


def about(name: str) -> str:
    """Return a task's description in one line."""
    return (inspect.getdoc(TASKS[name]) or "").partition("\n")[0].partition(": ")[2].rstrip(".")


def options_of(name: str, given: Iterable[str] = ()) -> dict[str, Any]:
    """Return a task's options as name -> annotation; all of `given` have to be among them."""
    if name not in TASKS:
        raise UserError(f"{name!r}: no such task{nearest(name, TASKS)}")
    annotations = typing.get_type_hints(TASKS[name])
    options = {key: kind for key, kind in annotations.items() if key not in ("split", "source", "return")}
    for key in given:
        if key not in options:
            raise UserError(f"task {name} has no option {key}{nearest(key, options)}")
    return options
