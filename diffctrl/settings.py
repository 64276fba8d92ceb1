"""Settings of a method as text: `u=0.5` -> the typed fields of its frozen config class, and back."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from diffctrl.errors import BadRequestError, nearest

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def field_types(config_class: type) -> dict[str, Any]:
    """Name -> type of every setting, in the order of the class."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields(config_class)}


def parse(config_class: type, settings: Mapping[str, Any], *, of: str) -> Any:
    """The config object with these settings; the rest keep their defaults.

    Args:
        config_class: a frozen dataclass that checks its values when made.
        settings: name -> value; text is converted to the field's type, other values are taken as they are.
        of: the method's name, for the messages.

    Raises:
        BadRequestError: a name is unknown, or a value is not of its type or out of range.
    """
    known = field_types(config_class)
    values = {}
    for name, value in settings.items():
        if name not in known:
            raise BadRequestError(
                f"{of} has no option {name!r}{nearest(name, known)}; accepted: {', '.join(known)}"
            )
        if isinstance(value, str):
            try:
                value = convert(known[name], value)
            except ValueError as error:
                raise BadRequestError(f"{of}: {name}={value} is {error}") from None
        values[name] = value
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise BadRequestError(f"{of}: {error}") from None


def convert(kind: Any, text: str) -> Any:
    """The value that `text` writes down, of type `kind`.

    Raises:
        ValueError: it writes none; the message completes the sentence "X is ...".

    >>> convert(float, "0.5"), convert(bool, "off"), convert(int | None, "none")
    (0.5, False, None)
    """
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _choice(typing.get_args(kind), text)
    if origin in (typing.Union, types.UnionType):
        return _first_of(typing.get_args(kind), text)
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError("neither true nor false")
        return text.lower() in _TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("not a whole number" if kind is int else "not a number") from None
    if kind is str:
        return text
    raise ValueError(f"not something that can be written as text ({kind})")


def _choice(choices: tuple[Any, ...], text: str) -> Any:
    for choice in choices:
        if text == str(choice):
            return choice
    names = ", ".join(str(choice) for choice in choices)
    raise ValueError(f"not one of {names}{nearest(text, map(str, choices))}")


def _first_of(kinds: tuple[Any, ...], text: str) -> Any:
    """The first member of a union that takes the text; `none` is None, plain text comes last."""
    if type(None) in kinds and text.lower() == "none":
        return None
    reasons = []
    for kind in sorted((kind for kind in kinds if kind is not type(None)), key=lambda kind: kind is str):
        try:
            return convert(kind, text)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(" and ".join(reasons))


def as_plain(config: Any) -> dict[str, Any]:
    """Every field as a value that JSON keeps and `parse` takes back; tuples become 'a,b'."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value)
    return str(value)
