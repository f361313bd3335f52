"""Temporary folders that are removed after their process, even one that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "nmcpp-"
"""Short: a socket's path has at most 107 bytes."""
_UNLOCKED = f".{_PREFIX}"
"""Prefix until the owner holds the lock: a folder named with ``_PREFIX`` has been locked before
anyone could see it under that name, so that one whose lock is free has lost its owner."""
_MOMENT = 60.0
"""Seconds after which an empty folder that was never locked has lost its owner as well."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder in the temporary directory, which is removed at the end.

    The kernel releases the owner's lock on it when the owner is killed, also while it removes the
    folder; the next call in any process of this user then removes what is left.
    """
    _sweep()
    made = Path(tempfile.mkdtemp(prefix=_UNLOCKED))
    descriptor = os.open(made, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody will sweep it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = made.rename(made.with_name(made.name.removeprefix(".")))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _sweep() -> None:
    """Remove the folders of this user whose owners are gone."""
    temporary = Path(tempfile.gettempdir())
    for folder in temporary.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
    for folder in temporary.glob(f"{_UNLOCKED}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _MOMENT:
                folder.rmdir()
