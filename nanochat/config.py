"""Frozen dataclasses as configuration: dotted overrides parsed by annotation, and a printable resolved form.

An experiment's `config()` returns a (possibly nested) frozen dataclass. `override` applies `a.b=c`
strings from the command line; nothing else in the program parses configuration.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

C = TypeVar("C")


def base_dir() -> Path:
    """Return the folder for data, tokenizers and runs: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat."""
    folder = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "nanochat"


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback."""


class UsageError(UserError):
    """A `UserError` about the command line itself; the process exits with code 2."""


def override(config: C, assignments: Sequence[str]) -> C:
    """Return a copy of `config` with every `dotted.name=value` of `assignments` applied, in order.

    Values are parsed by the annotation of the field they name: `none` for an optional field, `a,b,c` for a
    tuple, `1e6`, `2**19` and `80*2**19` for an int, any of true/false/1/0/yes/no/on/off for a bool.

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
    field = path[0]
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}
    value = values.get(field)
    if field not in values or (len(path) > 1 and not dataclasses.is_dataclass(value)):
        raise UsageError(f"--set {name}: no such setting{nearest(name, [n for n, _ in flatten(root)])}")
    if len(path) > 1:
        new = _replace(value, path[1:], name, text, root)
    elif dataclasses.is_dataclass(value):
        inside = ", ".join(f"{name}.{f.name}" for f in dataclasses.fields(value))
        raise UsageError(f"--set {name}: is a group of settings; set one of {inside}")
    else:
        try:
            new = parse(text, typing.get_type_hints(type(node))[field])
        except ValueError as error:
            raise UsageError(f"--set {name}={text}: {error}") from None
    return dataclasses.replace(node, **{field: new})


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean …?` for a misspelt name, or the list of all names."""
    names = list(names)
    if not names:
        return "; there are none"

    def likeness(candidate: str) -> float:
        # A bare leaf (`embeding_lr`) is as near to the dotted name that ends in it as to the leaf itself.
        leaf = candidate.rsplit(".", 1)[-1]
        pairs = ((name, candidate), (name.rsplit(".", 1)[-1], leaf))
        return max(difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)

    near = [n for n in sorted(names, key=likeness, reverse=True)[:3] if likeness(n) >= 0.6]
    # Beside a name that fits all but exactly, the merely similar ones would only distract.
    near = [n for n in near if likeness(n) >= likeness(near[0]) - 0.15]
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(names)}"


def parse(text: str, annotation: Any) -> Any:
    """Parse `text` as a value of `annotation`.

    Raises:
        ValueError: with a message that names what was expected.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        errors = []
        for kind in args:
            try:
                return parse(text, kind)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(" or ".join(errors))
    if annotation is type(None):
        raise ValueError("none")
    if origin is Literal:
        for choice in args:
            if str(choice).lower() == text.lower():
                return choice
        near = nearest(text, [str(a) for a in args])
        raise ValueError(f"expected one of {', '.join(map(str, args))}{near if 'mean' in near else ''}")
    if origin is tuple or annotation is tuple:
        return _parse_tuple(text, args)
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
            number = float(text)
        except ValueError:
            raise ValueError("expected a number") from None
        if math.isnan(number):
            raise ValueError("expected a number")
        return number
    if annotation is str:
        return text
    if annotation is Path:
        return Path(text).expanduser()
    raise ValueError(f"settings of type {annotation} cannot be set from the command line")


def _parse_tuple(text: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not kinds or kinds[-1] is Ellipsis:
        return tuple(parse(part, kinds[0] if kinds else str) for part in parts)
    if len(parts) != len(kinds):
        raise ValueError(f"expected {len(kinds)} values with commas between them, got {len(parts)}")
    return tuple(parse(part, kind) for part, kind in zip(parts, kinds))


def _parse_int(text: str) -> int:
    # A product of factors, each a whole number or a power of two: 80*2**19.
    number = 1
    for factor in text.replace("**", "^").split("*"):
        base, power, exponent = (part.strip() for part in factor.partition("^"))
        try:
            number *= _whole(base) ** _exponent(exponent) if power else _whole(base)
        except ValueError:
            raise ValueError("expected a whole number") from None
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer():  # false for nan and inf as well
        raise ValueError(text)
    return int(number)


def _exponent(text: str) -> int:
    exponent = int(text)
    if not 0 <= exponent <= 64:  # a negative one gives no whole number, a huge one would never end
        raise ValueError(text)
    return exponent


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
