"""How a rank says what ended it: in the error file of torch elastic.

Whoever starts a rank, torchrun or :func:`nemo_megacpp.runtime.launch.launch`, names a file in
``TORCHELASTIC_ERROR_FILE``; torchrun prints the first one as the root cause of a failed job.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from nemo_megacpp.errors import UserError


class RankError(NamedTuple):
    """The exception that ended a rank.

    Attributes:
        rank: that raised it.
        time: when it was written, in seconds since the epoch.
        message: of a UserError as it is; else with the type, and the line of the user's code.
        user_error: whether it was a UserError.
        stall: whether this is the end of a stalled run, which names the rank that caused it.
    """

    rank: int
    time: float
    message: str
    user_error: bool
    stall: bool = False


class _ErrorFile(ErrorHandler):
    """torch's error file; of a UserError it holds the message without a traceback."""

    def record_exception(self, e: BaseException) -> None:
        path = self._get_error_file_path()
        with contextlib.suppress(OSError):  # a full disk must not hide the exception
            super().record_exception(e)
            if path and isinstance(e, UserError):
                data = json.loads(Path(path).read_text(encoding="utf-8"))
                del data["message"]["extraInfo"]["py_callstack"]
                data["message"] |= {"message": str(e), "errorCode": 2}
                Path(path).write_text(json.dumps(data), encoding="utf-8")


def record_failure(main: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``main`` under torch's ``@record``: an exception is written to this rank's error file,
    if it has one, and raised again."""
    return record(main, _ErrorFile())


def read_error(path: Path, rank: int) -> RankError | None:
    """Return what a rank wrote to its error file; None if it wrote nothing, or was killed then."""
    try:
        error = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (FileNotFoundError, ValueError):
        return None
    traceback, stall = error["extraInfo"].get("py_callstack"), error.get("errorCode") == 1
    message = error["message"] + ("" if traceback is None else _place(traceback))
    user_error = traceback is None and not stall
    return RankError(rank, path.stat().st_mtime, message, user_error, stall)


def write_stall(message: str, began: float) -> bool:
    """Write to this rank's error file, if it has one, that the run has stalled.

    Args:
        message: for the user.
        began: in seconds since the epoch. torchrun reports the earliest error of all ranks.

    Returns:
        Whether a launcher reads it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    details = {"timestamp": str(int(began))}
    error = {"message": message, "extraInfo": details, "errorCode": 1}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": error}), encoding="utf-8")
    return True


_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)$', re.M)
_RANK = re.compile(r"^rank \d+: ", re.M)
_TRACEBACK = "Traceback (most recent call last):"
_LIBRARIES = tuple(
    str(Path(folder).resolve())
    for name in ("torch", "megatron", "nemo", "lightning", "nemo_run", "fiddle", "nemo_megacpp")
    if (found := find_spec(name)) is not None
    for folder in found.submodule_search_locations or ()
)
_PATHS = sysconfig.get_paths()
_INSTALLED = tuple({str(Path(_PATHS[name]).resolve()) for name in ("purelib", "platlib")})
_STANDARD = str(Path(_PATHS["stdlib"]).resolve())


def describe_tracebacks(text: str) -> str:
    """Return the exception of the first rank that failed in the user's code, with that line.

    Where no rank did, as where a layout is refused, return the last exception alone.

    Args:
        text: of a :class:`nemo_megacpp.runtime.workers.WorkerError`: the tracebacks of the ranks,
            in the order in which they failed.
    """
    for rank in _RANK.split(text):
        last = rank.rpartition(_TRACEBACK)[2]
        if place := _place(last):
            return next(line for line in last.splitlines() if line[:1].strip()) + place
    return text.strip().splitlines()[-1]


def _place(traceback: str) -> str:
    """Return `` (file, line, function)`` of the innermost frame of the user's code.

    That is one that belongs neither to Python, torch, Megatron, NeMo nor this package; code that is
    not installed as a package goes before code that is. Empty if there is none.
    """
    frames = [
        (found["file"], int(found["line"]), found["function"])
        for found in _FRAME.finditer(traceback.rpartition(_TRACEBACK)[2])
    ]
    frame = innermost_of_user(frames)
    return "" if frame is None else f" ({frame[0]}, line {frame[1]}, in {frame[2]})"


_Frame = TypeVar("_Frame", bound=tuple[str, int, str])


def innermost_of_user(frames: Sequence[_Frame]) -> _Frame | None:
    """Return the innermost of ``(file, line, function)`` that is the user's code, if any."""
    users = [
        frame
        for frame in frames
        if not frame[0].startswith("<")
        and not _is_in(frame[0], _LIBRARIES)
        and (_is_in(frame[0], _INSTALLED) or not _is_in(frame[0], (_STANDARD,)))
    ]
    own = [frame for frame in users if not _is_in(frame[0], _INSTALLED)]
    return next(reversed(own or users), None)


def _is_in(file: str, folders: tuple[str, ...]) -> bool:
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in folders)
