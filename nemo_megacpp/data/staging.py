"""What a long preparation needs: a folder for its progress, a lock, progress bars.

The progress is saved beside the output. Only the same request resumes it, and only from files that
are complete. The output gets its name by one rename, at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

_STATE = "state.json"


class Stage:
    """The progress of a preparation.

    Attributes:
        folder: holds everything.
        parts: the encoded shards.
        whole: becomes the output.
        resumed: whether an interrupted preparation is resumed.
    """

    def __init__(self, folder: Path, request: dict[str, Any]):
        self.folder, self.parts, self.whole = folder, folder / "parts", folder / "whole"
        self.resumed = self.read(_STATE) == request
        if not self.resumed:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.write(_STATE, request)
        shutil.rmtree(self.whole, ignore_errors=True)
        self.whole.mkdir()

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file by one rename, so that it is complete or missing."""
        begun = self.folder / f".{name}"
        begun.write_text(json.dumps(content), encoding="utf-8")
        sync(begun)
        begun.rename(self.folder / name)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what `write` wrote, or None."""
        try:
            return dict(json.loads((self.folder / name).read_bytes()))
        except FileNotFoundError:
            return None


@contextmanager
def staging(out: Path, request: dict[str, Any]) -> Iterator[Stage]:
    """Give the stage of ``out``, which is renamed to ``out`` at the end.

    An error removes the stage. An interrupt or the death of the process leaves it: the same request
    resumes it, another one removes it.

    Raises:
        UserError: ``out`` cannot be written, or another process is preparing it.
    """
    out = out.resolve()  # a link to a folder keeps pointing at it
    missing = [folder for folder in out.parents if not folder.exists()]
    folder, replaced = _stage_of(out), out.parent / f".{out.name}.replaced"
    try:
        with _lock_stage(out):
            try:
                folder.mkdir(exist_ok=True)
                if replaced.exists() and not out.exists():  # killed between the two renames
                    replaced.rename(out)
                stage = Stage(folder, request)
                yield stage
                if out.exists():
                    out.rename(replaced)
                stage.whole.rename(out)
                shutil.rmtree(folder)
                shutil.rmtree(replaced, ignore_errors=True)
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                if replaced.exists() and not out.exists():
                    replaced.rename(out)
                raise
    except BlockingIOError:
        raise UserError(f"{str(out)!r} is being prepared by another process.") from None
    except OSError as error:
        raise UserError(f"Cannot write {str(out)!r}: {error.strerror or error}.") from error
    finally:
        for parent in missing:  # of an output that was not made
            with suppress(OSError):
                parent.rmdir()


def clear_stage(out: Path) -> None:
    """Remove what an interrupted preparation of ``out`` left, unless a process works on it."""
    out = out.resolve()
    if _stage_of(out).exists():
        with suppress(BlockingIOError), _lock_stage(out):
            shutil.rmtree(_stage_of(out), ignore_errors=True)


def _stage_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@contextmanager
def _lock_stage(out: Path) -> Iterator[None]:
    path = out.parent / f".{out.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path, wait=False):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def lock_file(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a file locked; the lock ends with the process, on NFS too.

    Args:
        path: of the file, which is created; the holder may remove it.
        wait: for a process that holds it; else raise BlockingIOError.
    """
    while True:
        with path.open("w") as file:  # for writing: NFS gives no exclusive lock otherwise
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                current = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                current = False
            if current:
                yield
                return
            # The last holder has removed the file, so others lock a new one of this name.


def sync(path: Path) -> None:
    """Wait until a file's content would survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def bars(shown: bool) -> Iterator[Progress]:
    """Give progress bars on standard error, whose tasks count bytes."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield progress
