"""Temporary folders that are removed after their process, even one that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "nmcpp-"
"""Short: a socket's path has at most 107 bytes."""
_MARK = "owned"
"""File in a folder whose owner has locked it: a folder without it may be a moment old."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder in the temporary directory, which is removed at the end.

    The kernel releases the owner's lock on it when the owner is killed; the next call in any
    process of this user then removes it.
    """
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody will sweep it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / _MARK).touch()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _sweep() -> None:
    """Remove the folders of this user whose owners are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or not (folder / _MARK).is_file():
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
