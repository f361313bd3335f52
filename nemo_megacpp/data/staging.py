"""The folder beside the output in which a preparation is under way.

What it holds is only ever taken up again by the same request, and only what is there whole. The
output appears under its name by one rename, at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_megacpp.errors import UserError

_STATE = "state.json"


class Stage:
    """A preparation under way.

    Attributes:
        folder: everything lies in here.
        parts: the encoded shards.
        whole: what will be the output.
        resumed: whether an interrupted preparation is gone on with.
    """

    def __init__(self, folder: Path, request: dict[str, Any]):
        self.folder, self.parts, self.whole = folder, folder / "parts", folder / "whole"
        state = self.read(_STATE)
        self.resumed = state == request
        if not self.resumed:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.write(_STATE, request)
        shutil.rmtree(self.whole, ignore_errors=True)
        self.whole.mkdir()

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        begun = self.folder / f".{name}"
        with begun.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        begun.rename(self.folder / name)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what `write` wrote, None if it did not get to that."""
        try:
            return dict(json.loads((self.folder / name).read_bytes()))
        except FileNotFoundError:
            return None


@contextmanager
def staging(out: Path, request: dict[str, Any]) -> Iterator[Stage]:
    """Give the stage of ``out``, which takes that name if all goes well.

    An error leaves nothing; an interrupt, or the death of the process, leaves the stage, to be gone
    on with by the same request, or cleared away by another.

    Raises:
        UserError: ``out`` cannot be written, or another process is preparing it.
    """
    out = out.resolve()  # a link to a folder keeps pointing at it
    missing = [folder for folder in out.parents if not folder.exists()]
    folder, replaced = _stage_of(out), out.parent / f".{out.name}.replaced"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder, out):
                stage = Stage(folder, request)
                yield stage
                if out.exists():
                    out.rename(replaced)
                stage.whole.rename(out)
                shutil.rmtree(folder)
        except OSError as error:
            raise UserError(f"Cannot write {str(out)!r}: {error.strerror or error}.") from error
    except _Busy as busy:
        raise UserError(str(busy)) from None
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        for parent in missing:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def clear_stage(out: Path) -> None:
    """Remove what a preparation of ``out`` left, unless one is under way."""
    folder = _stage_of(out.resolve())
    with suppress(FileNotFoundError, _Busy), _locked(folder, out):
        shutil.rmtree(folder)


def _stage_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


class _Busy(Exception):
    pass


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder itself locked: the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Busy(f"{str(out)!r} is being prepared by another process.") from None
        yield
    finally:
        os.close(descriptor)
