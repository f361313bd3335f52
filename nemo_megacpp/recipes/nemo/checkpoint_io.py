"""NeMo's asynchronous checkpoint writer on Megatron-Core 0.16, and what a failed save says."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from nemo.lightning.io.pl import MegatronCheckpointIO
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from torch.distributed.checkpoint import CheckpointException

from nemo_megacpp.errors import UserError


class AsyncCheckpointIO(AsyncFinalizableCheckpointIO):
    """NeMo's wrapper, which cannot be constructed with Megatron-Core 0.16.

    Its module imports ``strategies.tensorstore``, gone in 0.16, and takes that for Megatron-Core
    not being there. What the class itself needs is there.

    One save is under way at a time: a second waits for the first.

    Args:
        checkpoint_io: writes the checkpoints; made with ``async_save=True``.
    """

    def __init__(self, checkpoint_io: MegatronCheckpointIO):
        _WrappingCheckpointIO.__init__(self, checkpoint_io)
        self.async_calls_queue = AsyncCallsQueue()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Start to save in the background; all ranks call this."""
        self.maybe_finalize_save_checkpoint(blocking=True)
        super().save_checkpoint(checkpoint, path, storage_options)

    def then(self, request: AsyncRequest) -> None:
        """Run another request in the background, after those under way; all ranks call this."""
        self.async_calls_queue.schedule_async_request(request)

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> bool:
        """Finish what has been written; see NeMo's.

        Raises:
            UserError: a save has failed.
        """
        with told_as_user_error():
            return super().maybe_finalize_save_checkpoint(blocking)


@contextlib.contextmanager
def told_as_user_error(directory: Path | None = None) -> Iterator[None]:
    """Turn what the file system says against a save into one line.

    Args:
        directory: the checkpoint, if known.
    """
    try:
        yield
    except (OSError, CheckpointException) as error:
        reason = _reason(error)
        if isinstance(error, CheckpointException):  # all ranks have it; rank 0 knows why
            told = [reason]
            torch.distributed.broadcast_object_list(told, src=0)
            reason = told[0]
        where = "" if directory is None else f" {directory}"
        raise UserError(
            f"The checkpoint{where} could not be saved: {reason}. Earlier ones are as they were."
        ) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
        return _reason(failures[0]) if failures else "another rank could not write"
    cause = error.__cause__
    return _reason(cause) if isinstance(cause, OSError) else str(error).rstrip(".")
