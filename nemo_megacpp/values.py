"""Values as YAML gives them, validated by pydantic against the annotations of a class's fields."""

from __future__ import annotations

import json
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from nemo_megacpp.errors import UserError
from nemo_megacpp.printable import cut, shown

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "null",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_LARGEST = 2**53
_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def read_value(owner: type, key: str, value: Any, name: str = "") -> Any:
    """Return ``value`` as the field ``key`` of ``owner`` holds it.

    Args:
        owner: a class with annotated fields; bounds stand in ``Annotated[…, Field(ge=…)]``.
        key: name of one of its fields.
        value: what YAML gave for it.
        name: what the user calls the field, if not ``key``.

    Raises:
        UserError: ``value`` is of another type or out of range, or YAML cannot write the type (a
            dtype, a function).
    """
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise UserError(f"{name or key}: {shown(value)} is beyond ±2^53, which no setting reaches.")
    hint = field_hints(owner)[key]
    words, range_ = type_words(hint), bounds(hint)
    if words in ("", "null"):
        raise UserError(f"{name or key} cannot be set in a recipe: YAML has no values of its type.")
    for candidate in (value, _with_numbers(value)):
        try:
            # JSON has YAML's types: a list may stand for a tuple, and true is not 1.
            return _adapter(owner, key).validate_json(json.dumps(candidate))
        except ValidationError as error:
            kinds = {item["type"] for item in error.errors(include_url=False)}
        except (TypeError, ValueError):  # a date
            kinds = set()
    if any(kind.startswith(("greater_than", "less_than")) for kind in kinds):
        raise UserError(f"{name or key}: {cut(str(value))} must be {range_}.")
    raise UserError(f"{name or key}: {shown(value)} is not {words}.")


@cache
def field_hints(owner: type) -> dict[str, Any]:
    """Return the annotations of a class's fields, bounds included."""
    return typing.get_type_hints(owner, include_extras=True)


@cache
def _adapter(owner: type, key: str) -> TypeAdapter[Any]:
    return TypeAdapter(field_hints(owner)[key], config=_CONFIG)


def _with_numbers(value: Any) -> Any:
    """Return ``value`` with texts as the numbers they spell: YAML 1.1 reads 4e-3 as a text."""
    if isinstance(value, list | tuple):
        return [_with_numbers(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def type_words(hint: Any) -> str:
    """Return what a person calls a type; nothing for one that YAML cannot write."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(filter(None, map(type_words, arguments)))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        any_length = origin is list or Ellipsis in arguments
        return "a list" if any_length else f"a list of {len(arguments)}"
    return _WORDS.get(hint, "")


def choices(hint: Any) -> tuple[str, ...]:
    """Return the values of a field that has a few, and no others."""
    for option in (hint, *typing.get_args(hint)):
        if typing.get_origin(option) is Literal:
            return typing.get_args(option)
    return ()


def bounds(hint: Any) -> str:
    """Return the range that an annotation declares, such as ``at least 0 and below 1``."""
    found = [bounds(argument) for argument in typing.get_args(hint)]
    for declared in getattr(hint, "__metadata__", ()):
        for item in declared.metadata if isinstance(declared, FieldInfo) else ():
            found += [
                f"{text} {getattr(item, k)}" for k, text in _BOUNDS.items() if hasattr(item, k)
            ]
    return " and ".join(filter(None, found))
