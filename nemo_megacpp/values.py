"""Values as YAML gives them, held to the types of a configuration's fields."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from functools import cache
from typing import Any, Literal, Union

from nemo_megacpp.errors import UserError

_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}


def read_value(owner: type, key: str, value: Any) -> Any:
    """Return ``value`` as the field ``key`` of ``owner`` holds it.

    Args:
        owner: a class with annotated fields.
        key: name of one of its fields.
        value: what YAML gave for it.

    Raises:
        UserError: ``value`` is not of the field's type, or YAML cannot write that type (a dtype, a
            function).
    """
    hint = _hints(owner)[key]
    union = typing.get_origin(hint) in (Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        with contextlib.suppress(ValueError, OverflowError):
            return _convert(option, value)
    words = [word for option in options if (word := _word(option))]
    if words in ([], [_WORDS[type(None)]]):
        raise UserError(f"{key} cannot be set in a recipe: YAML has no values of its type.")
    raise UserError(f"{key}: {value!r} is not {' or '.join(words)}.")


@cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _convert(option: Any, value: Any) -> Any:
    """Return ``value`` as the type ``option``; raise ValueError if it is of another."""
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin in (list, tuple):
        if isinstance(value, (list, tuple)) and (origin is list or len(value) == len(arguments)):
            return origin(_convert(arguments[0], item) for item in value)
    elif option is float:
        # YAML 1.1 reads 4e-3 as a text.
        if type(value) in (int, float, str) and math.isfinite(number := float(value)):
            return number
    elif option in _WORDS and type(value) is option:
        return value
    raise ValueError


def _word(option: Any) -> str:
    """Return what a person calls the type; nothing for one that YAML cannot write."""
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return "a list" if origin is list else f"a list of {len(arguments)}"
    return _WORDS.get(option, "")
