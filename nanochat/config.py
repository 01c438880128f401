"""Settings as frozen dataclasses: overrides parsed by annotation, help from docstrings, one line for each mistake.

An experiment's `config()` returns a (possibly nested) frozen dataclass; `override` applies `a.b=c` strings to it.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

C = TypeVar("C")
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def base_dir() -> Path:
    """Return the folder for data, tokenizers and runs: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat."""
    folder = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "nanochat"


class UserError(Exception):
    """A mistake that the user can fix: shown as one line, without a traceback."""


class UsageError(UserError):
    """A `UserError` about the command line itself; the process exits with code 2."""


# Ranges of settings: the type, what is allowed, in words, and whether a value is.
PositiveInt = Annotated[int, "at least 1", lambda x: x >= 1]
NonNegativeInt = Annotated[int, "at least 0", lambda x: x >= 0]
PositiveFloat = Annotated[float, "above 0, and finite", lambda x: 0 < x < math.inf]
NonNegativeFloat = Annotated[float, "at least 0, and finite", lambda x: 0 <= x < math.inf]
Fraction = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]


class Settings:
    """Base of the dataclasses of settings: a value out of its annotation's range is a UserError."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            require_in_range(name, getattr(self, name), hint)


def require_in_range(name: str, value: Any, hint: Any) -> None:
    """Raise a UserError if a setting's value, or an item of a tuple, is out of the range in its annotation."""
    if typing.get_origin(hint) is Annotated:
        kind, allowed, is_allowed = typing.get_args(hint)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (int, float) if kind is float else kind) and not is_allowed(item):
                raise UserError(f"{name}={item!r}: must be {allowed}")
    for part in typing.get_args(hint):
        require_in_range(name, value, part)


def override(config: C, assignments: Sequence[str], renamed: Mapping[str, str] | None = None) -> C:
    """Return a copy of `config` with every `dotted.name=value` of `assignments` applied, in order.

    The field's annotation decides how a value is parsed: an empty value or `none` for None and for an empty tuple,
    `a,b,c` for a tuple (`\\,` in an item is a comma), `1e6`, `2**19` and `80*2**19` for an int, true/false/1/0/yes/no/
    on/off for a bool. An old name, or old `name=value`, of `renamed` is answered with the new one.
    """
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise UsageError(f"--set {assignment}: expected name=value")
        try:
            config = _replace(config, name.split("."), name, text, config)
        except UsageError:
            for old, new in (renamed or {}).items():
                given = f"{name}={text}" if "=" in old else name
                if given == old or given.endswith(f".{old}"):
                    raise UsageError(f"--set {given}: is now {given.removesuffix(old)}{new}") from None
            raise
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
        hint = typing.get_type_hints(type(node), include_extras=True)[field]
        require_in_range(name, text if new is None else new, hint)
    return dataclasses.replace(node, **{field: new})


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean …?` for a misspelled name, or the list of all names."""
    names = list(names)
    if not names:
        return "; there are none"
    leaf = name.rsplit(".", 1)[-1].lower().replace("learning_rate", "lr")
    # `lr` and `batch_size` are meant as each of matrix_lr, embedding_lr, …; device_batch_size, total_batch_size.
    longer = [n for n in names if f"_{leaf}" in f"_{n.rsplit('.', 1)[-1]}" and n.endswith(leaf)]
    if len(leaf) > 1 and leaf not in (n.rsplit(".", 1)[-1] for n in names) and longer:
        return f"; did you mean {' or '.join(longer[:6])}?"

    def similarity(candidate: str) -> float:
        # A bare leaf (`embeding_lr`) is as near to the dotted name that ends in it as to the leaf itself.
        pairs = ((name.lower(), candidate.lower()), (leaf, candidate.rsplit(".", 1)[-1].lower()))
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    near = [n for n in sorted(names, key=similarity, reverse=True)[:3] if similarity(n) >= 0.6]
    # Beside a name that fits all but exactly, the merely similar ones would only distract.
    near = [n for n in near if similarity(n) >= similarity(near[0]) - 0.15]
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(names)}"


def parse(text: str, annotation: Any) -> Any:
    """Parse `text` as a value of `annotation`; a ValueError names what was expected."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() in ("", "none", "null"):
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
        return _parse_tuple("" if text.lower() == "none" else text, args)
    if annotation is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError("expected true or false")
    if annotation is int:
        return _parse_int(text)
    if annotation is float:
        with contextlib.suppress(ValueError):
            if not math.isnan(number := float(text)):
                return number
        raise ValueError("expected a number")
    if annotation is str:
        return text
    if annotation is Path:
        return Path(text).expanduser()
    raise ValueError(f"settings of type {annotation} cannot be set from the command line")


def _parse_tuple(text: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    items = [item.strip().replace(r"\,", ",") for item in re.split(r"(?<!\\),", text) if item.strip()]
    if not kinds or kinds[-1] is Ellipsis:
        return tuple(parse(item, kinds[0] if kinds else str) for item in items)
    if len(items) != len(kinds):
        raise ValueError(f"expected {len(kinds)} values separated by commas, got {len(items)}")
    return tuple(parse(item, kind) for item, kind in zip(items, kinds))


def _parse_int(text: str) -> int:
    """Parse a product of factors, each an integer or a power of one: 80*2**19."""
    number = 1
    try:
        for factor in text.replace("**", "^").split("*"):
            base, power, exponent = factor.partition("^")
            if power and not 0 <= int(exponent) <= 64:  # a negative power is not an integer, a huge one never ends
                raise ValueError
            number *= _integer(base) ** int(exponent or 1)
    except (ValueError, OverflowError):
        raise ValueError("expected an integer") from None
    if not -(2**63) <= number < 2**63:  # those who compute with it use floats and C's integers
        raise ValueError("expected an integer of at most 64 bits")
    return number


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer():  # false for nan and inf as well
        raise ValueError(text)
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


def explain(config: Any, prefix: str = "") -> str:
    """Return a paragraph for each setting: name, type or choices, default, and its meaning from the docstring."""
    hints, meanings = typing.get_type_hints(type(config), include_extras=True), _meanings(type(config))
    paragraphs = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            paragraphs.append(explain(value, f"{name}."))
        elif field.init:
            head = f"  {name}: {_type_text(hints[field.name])} = {_value_text(value)}"
            text = textwrap.fill(meanings.get(field.name, ""), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
            paragraphs.append("\n".join(filter(None, [head, text])))
    return "\n".join(paragraphs)


def _meanings(kind: type) -> dict[str, str]:
    """Return field -> meaning from the `Attributes:` of a class and its bases; `a, b: text. c: text` is possible."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        names = "|".join(f.name for f in dataclasses.fields(base)) if dataclasses.is_dataclass(base) else ""
        _, _, text = " ".join((base.__doc__ or "").split()).partition("Attributes: ")
        if names and text:
            entry = rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): "
            _, *pieces = re.split(entry, text)
            for group, meaning in zip(pieces[::2], pieces[1::2]):
                meanings |= dict.fromkeys(group.split(", "), meaning.strip().rstrip("."))
    return meanings


def _type_text(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return f"{_type_text(args[0])} ({args[1]})"
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(kind) for kind in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return ",".join("…" if kind is Ellipsis else _type_text(kind) for kind in args)
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _value_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_value_text(item).replace(",", r"\,") for item in value) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
