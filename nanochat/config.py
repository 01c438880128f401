"""Frozen dataclasses as configuration: dotted overrides parsed by annotation, and a printable resolved form.

An experiment's `config()` returns a (possibly nested) frozen dataclass. `override` applies `a.b=c`
strings from the command line; nothing else in the program parses configuration.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar, Union

C = TypeVar("C")


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback."""


class UsageError(UserError):
    """A `UserError` about the command line itself; the process exits with code 2."""


def override(config: C, assignments: Sequence[str]) -> C:
    """Return a copy of `config` with every `dotted.name=value` of `assignments` applied, in order.

    Values are parsed by the annotation of the field they name: `none` for an optional field, `a,b,c` for a
    tuple, `1e6` and `2**19` for an int, any of true/false/1/0/yes/no for a bool.

    Raises:
        UsageError: the name is unknown (the nearest is offered), or the value does not parse.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: expected name=value")
        config = _replace(config, name.strip().split("."), name.strip(), text.strip(), config)
    return config


def _replace(node: Any, path: list[str], name: str, text: str, root: Any) -> Any:
    hints = typing.get_type_hints(type(node))
    field = path[0]
    if field not in hints or not hasattr(node, field):
        raise UsageError(f"--set {name}: no such setting{nearest(name, [n for n, _ in flatten(root)])}")
    value = getattr(node, field)
    if len(path) > 1:
        if not dataclasses.is_dataclass(value):
            raise UsageError(f"--set {name}: no such setting{nearest(name, [n for n, _ in flatten(root)])}")
        new = _replace(value, path[1:], name, text, root)
    elif dataclasses.is_dataclass(value):
        inside = ", ".join(f"{name}.{f.name}" for f in dataclasses.fields(value))
        raise UsageError(f"--set {name}: is a group of settings; set one of {inside}")
    else:
        try:
            new = parse(text, hints[field])
        except ValueError as error:
            raise UsageError(f"--set {name}={text}: {error}") from None
    return dataclasses.replace(node, **{field: new})


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean …?` for a misspelt name, or the list of all names."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    # A bare leaf name (`--set embedding_lr=1`) is nearest to the dotted name that ends in it.
    near += [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1] and n not in near]
    return f"; did you mean {' or '.join(near[:3])}?" if near else f"; there are: {', '.join(names)}"


def parse(text: str, annotation: Any) -> Any:
    """Parse `text` as a value of `annotation`.

    Raises:
        ValueError: with a message that names what was expected.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        kinds = [a for a in args if a is not type(None)]
        errors = []
        for kind in kinds:
            try:
                return parse(text, kind)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(" or ".join(errors))
    if origin is Literal:
        for choice in args:
            if str(choice).lower() == text.lower():
                return choice
        near = nearest(text, [str(a) for a in args])
        raise ValueError(f"expected one of {', '.join(map(str, args))}{near if 'mean' in near else ''}")
    if origin is tuple:
        inner = args[0] if args else str
        return tuple(parse(part.strip(), inner) for part in text.split(",") if part.strip())
    if annotation is bool:
        word = text.lower()
        if word in ("true", "1", "yes", "on"):
            return True
        if word in ("false", "0", "no", "off"):
            return False
        raise ValueError("expected true or false")
    if annotation is int:
        return _parse_int(text)
    if annotation is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError("expected a number") from None
    if annotation is str:
        return text
    raise ValueError(f"settings of type {annotation} cannot be set from the command line")


def _parse_int(text: str) -> int:
    base, power, exponent = text.partition("**")
    try:
        if power:
            return int(base) ** int(exponent)
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():  # also false for nan; inf raises nothing and is no integer
        raise ValueError("expected a whole number")
    return int(number)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every leaf setting, in the order of declaration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def describe(config: Any) -> str:
    """Return the configuration as aligned `name  value` lines, to print before a run."""
    rows = list(flatten(config))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
