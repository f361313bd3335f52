"""The file system's errors while a checkpoint is saved, in one line."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import CheckpointException

from nemo_megacpp.errors import UserError


@contextlib.contextmanager
def save_errors(directory: Path, kept: str) -> Iterator[None]:
    """Raise the file system's error in one line, as a UserError.

    It gives the free space as well: torch's writer reports a full disk as a wrong position.

    Args:
        directory: the checkpoint that is saved.
        kept: a sentence on what is unchanged.
    """
    writers = logging.getLogger(filesystem_async.__name__)
    level = writers.level
    writers.setLevel(logging.CRITICAL)  # they log, on every rank, what is raised here
    try:
        yield
    except (OSError, CheckpointException) as error:
        told = [_reason(error)]
        if isinstance(error, CheckpointException):  # all ranks have it; rank 0 knows why
            torch.distributed.broadcast_object_list(told, src=0)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(directory.parent).free
            told.append(f"{free / 1e6:,.1f} MB are free on that disk")
        raise UserError(
            f"The checkpoint {directory} could not be saved: {'; '.join(told)}. {kept}"
        ) from None
    finally:
        writers.setLevel(level)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
        return _reason(failures[0]) if failures else "another rank could not write"
    if isinstance(error.__cause__, OSError):
        return _reason(error.__cause__)
    if "unexpected pos" in str(error):  # torch's writer, of a file that did not grow
        return "writing a file failed (a full disk, a quota, or a limit on file sizes)"
    return str(error).rstrip(".")
