"""JSON files read through a declared shape, with limits on size, depth and numbers."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Ge, Le, MaxLen

from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

Count = Annotated[int, Ge(0), Le(2**53)]
"""A size, an offset or a number of steps."""
Text = Annotated[str, MaxLen(65536)]

_MOST_NAMED = 3


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a file of at most ``limit`` bytes.

    Raises:
        UserError: it is missing, is not a regular file (a pipe would be waited for), cannot be
            read, or is larger.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
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
    from pydantic import ValidationError

    try:
        return shape.validate_json(content, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    told = [_line(problem) for problem in found[:_MOST_NAMED]]
    more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    raise UserError(f"{path} is damaged: {'; '.join(told)}{more}.")


def _line(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    text = problem["msg"].removeprefix("Input ").replace("\n", " ")
    text = text[:1].lower() + text[1:]
    if not where or problem["type"] == "missing":
        return f"{where}: {text}" if where else text
    value = repr(problem["input"])
    return f"{where} {text}, and is {value if len(value) <= 40 else value[:37] + '...'}"
