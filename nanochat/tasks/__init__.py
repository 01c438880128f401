"""The tasks, one module each: `load(split, *, source=None, **options) -> Task`. A copied file is a new task.

    from nanochat import tasks
    tasks.load("gsm8k", "test").row(0)
    tasks.from_text("mmlu:auxiliary_train")

Tasks of the hub are read with `datasets`; `source` is a file or a folder of theirs to be read instead, and a folder may
hold those of many tasks (`nanochat.tasks._table`). Tasks that are generated, or ship with the package, look into the
folder too, and need nothing there.
"""

import importlib
import inspect
import typing
from pathlib import Path
from typing import Any

from nanochat.config import UserError, nearest, parse
from nanochat.task import Task


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


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
