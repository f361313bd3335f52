"""A folder that a command makes: whole, or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_megacpp.errors import UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` to write into; it becomes ``out`` if nothing is raised.

    Raises:
        UserError: ``out`` exists and is not an empty folder, or cannot be made, or an OSError
            ended the block.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; give a folder that does not.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}.") from None
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} was not made: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
