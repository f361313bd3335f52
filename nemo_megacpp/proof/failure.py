"""What is said of a rank that has failed: its exception, and where in the user's code it arose."""

from __future__ import annotations

import re
import sysconfig
from importlib.util import find_spec
from pathlib import Path

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


def describe_failure(text: str) -> str:
    """Return the exception of a rank, with the file and line of the user's own code.

    That is the innermost frame that belongs neither to Python, torch, Megatron, NeMo nor this
    package; code that is not installed as a package goes before code that is. Where there is no
    such frame, as where a layout is refused, the exception alone is returned.

    Args:
        text: of a :class:`nemo_megacpp.runtime.workers.WorkerError`: the tracebacks of the ranks,
            in the order in which they failed.
    """
    for rank in _RANK.split(text):
        last = rank.rpartition(_TRACEBACK)[2]
        users = [frame for frame in _FRAME.finditer(last) if _is_users(frame["file"])]
        if users:
            own = [frame for frame in users if not _is_in(frame["file"], _INSTALLED)]
            frame = (own or users)[-1]
            message = next(line for line in last.splitlines() if line[:1].strip())
            return f"{message} ({frame['file']}, line {frame['line']}, in {frame['function']})"
    return text.strip().splitlines()[-1]


def _is_users(file: str) -> bool:
    """Say whether a frame's file may be the user's."""
    if file.startswith("<") or _is_in(file, _LIBRARIES):
        return False
    return _is_in(file, _INSTALLED) or not _is_in(file, (_STANDARD,))


def _is_in(file: str, folders: tuple[str, ...]) -> bool:
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in folders)
