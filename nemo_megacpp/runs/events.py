"""Events of a run: starts, checkpoints, stops, failures."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import AwareDatetime, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Count, Text, parse_json, read_limited
from nemo_megacpp.runs.run_folder import EVENTS_FILE

T = TypeVar("T")

_LIMIT = 1 << 30
"""Most bytes of a file of records."""


class Event(NamedTuple):
    """One event.

    Attributes:
        kind: ``started``, ``resumed``, ``checkpoint``, ``sigterm``, ``stopped``, ``failed`` or
            ``finished``; others may follow.
        step: steps that were complete.
        time: in UTC.
        details: further values by name.
    """

    kind: str
    step: int
    time: datetime.datetime
    details: dict[str, Any]


class _Record(TypedDict):
    """An event as a line of JSON."""

    kind: Text
    step: Count
    time: AwareDatetime
    details: dict[Text, Any]


def record_event(run_dir: Path, kind: str, step: int, **details: Any) -> None:
    """Append an event to the run's record; one rank calls this.

    Args:
        run_dir: the run's folder.
        kind, step: see :class:`Event`.
        details: values that JSON can represent.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    append_record(
        run_dir / EVENTS_FILE, {"kind": kind, "step": step, "time": now, "details": details}
    )


def read_events(run_dir: Path) -> list[Event]:
    """Return the run's events, oldest first; raises as :func:`read_records` does."""
    return [Event(**record) for record in read_records(run_dir / EVENTS_FILE, _Record)]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a line of JSON, after a line break if a kill has truncated the last line.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def read_records(path: Path, shape: type[T]) -> list[T]:
    """Return the records of a file of JSON lines, without lines that a kill has truncated.

    Raises:
        UserError: a whole line holds something else than ``shape``, or the file is too large.
    """
    if not path.exists():
        return []
    adapter, records = TypeAdapter(shape), []
    for line in read_limited(path, _LIMIT).splitlines():
        try:
            records.append(adapter.validate_json(line, strict=True))
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                parse_json(line, adapter, path)  # raises, and says what is wrong
    return records
