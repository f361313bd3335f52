"""JSON files read through a declared shape, with limits on size, depth and numbers."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Ge, Le, MaxLen

from nemo_megacpp.errors import UserError
from nemo_megacpp.printable import cut, printable, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

Count = Annotated[int, Ge(0), Le(2**53)]
"""A size, an offset or a number of steps."""
Text = Annotated[str, MaxLen(65536)]

_MOST_NAMED = 3
_MOST_OF_A_KEY = 200


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a file of at most ``limit`` bytes.

    Raises:
        UserError: it is missing, not a regular file, cannot be read, or is larger.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a named pipe would wait for a writer
            raise UserError(f"{path} cannot be read: it is not a regular file.")
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if len(content) > limit:
        raise UserError(f"{path} is damaged: it is larger than {limit:,} bytes.")
    return content


def read_json(path: Path, shape: TypeAdapter[T], limit: int) -> T:
    """Return the value of a JSON file; see :func:`read_limited` and :func:`parse_json`."""
    return parse_json(read_limited(path, limit), shape, path)


def parse_json(content: bytes, shape: TypeAdapter[T], path: Path) -> T:
    """Return the value of a JSON text, held to ``shape`` without converting types.

    Args:
        content: the text; lists and objects may be nested about 200 deep.
        shape: pydantic's declaration.
        path: of the file, for the error.

    Raises:
        UserError: naming the first keys whose values are wrong or missing.
    """
    return _checked(lambda: shape.validate_json(content, strict=True), path)


def check_shape(held: object, shape: TypeAdapter[T], path: Path) -> T:
    """Return what ``shape`` makes of an object that was read in another way.

    Raises:
        UserError: as :func:`parse_json`.
    """
    return _checked(lambda: shape.validate_python(held), path)


def _checked(validate: Callable[[], T], path: Path) -> T:
    from pydantic import ValidationError

    try:
        return validate()
    except ValidationError as error:
        count = error.error_count()
        found = error.errors(include_url=False, include_context=False)[:_MOST_NAMED]
    told = [_line(problem) for problem in found]
    more = f"; and {count - _MOST_NAMED:,} more" if count > _MOST_NAMED else ""
    raise UserError(f"{path} is damaged: {'; '.join(told)}{more}.")


def _line(problem: Any) -> str:
    where = cut(printable(".".join(map(str, problem["loc"]))), _MOST_OF_A_KEY)
    text = cut(problem["msg"].removeprefix("Input ").replace("\n", " "), _MOST_OF_A_KEY)
    text = text[:1].lower() + text[1:]
    if not where or problem["type"] == "missing":
        return f"{where}: {text}" if where else text
    return f"{where} {text}, and is {shown(problem['input'], 40)}"
