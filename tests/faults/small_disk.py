"""Disks that are too small: file systems in memory, where this process may mount them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_SIZES = (16 << 10, 3 << 20)
_ENOUGH = 256 << 20


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own.

    Attributes:
        folder: where it is mounted.
        size: bytes that it holds.
    """

    folder: Path
    size: int

    def enlarge(self) -> None:
        """Make room."""
        _mount("-o", f"remount,size={_ENOUGH}", str(self.folder))


def allow_mounts() -> None:
    """Give this process mounts of its own, if the system lets it; it must have one thread."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS) != 0 and libc.unshare(_NEW_USER | _NEW_MOUNTS) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


@contextlib.contextmanager
def small_disk(folder: Path, draw: random.Random) -> Iterator[SmallDisk | None]:
    """Mount a disk of a random size at the new ``folder``; None where that is not allowed."""
    size = draw.randint(*_SIZES)
    folder.mkdir()
    if not _mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder)):
        folder.rmdir()
        yield None
        return
    try:
        yield SmallDisk(folder, size)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False)


def _mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except OSError:
        return False
