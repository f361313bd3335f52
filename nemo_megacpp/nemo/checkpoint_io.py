"""NeMo's checkpoint reader and writer on Megatron-Core 0.16, and what a failed save says."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from nemo.lightning.io.pl import MegatronCheckpointIO
from nemo.lightning.pytorch.strategies.utils import ckpt_to_dir
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from torch.distributed.checkpoint import CheckpointException

from nemo_megacpp.checkpoint.backends import fit_to_checkpoint
from nemo_megacpp.checkpoint.folder import find_weights
from nemo_megacpp.checkpoint.safe_pickle import read_metadata
from nemo_megacpp.errors import UserError


class AcrossBackends(_WrappingCheckpointIO):
    """Asks a checkpoint for what it has, whichever backend wrote it."""

    def load_checkpoint(
        self, path: Any, sharded_state_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        fit_to_checkpoint(sharded_state_dict, read_metadata(find_weights(Path(path))))
        return self.checkpoint_io.load_checkpoint(
            path, sharded_state_dict=sharded_state_dict, **kwargs
        )


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
        self._under_way = Path()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Start to save in the background; all ranks call this."""
        self.maybe_finalize_save_checkpoint(blocking=True)
        self._under_way = Path(ckpt_to_dir(path))
        super().save_checkpoint(checkpoint, path, storage_options)

    def then(self, request: AsyncRequest) -> None:
        """Run another request in the background, after those under way; all ranks call this."""
        self.async_calls_queue.schedule_async_request(request)

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> bool:
        """Finish what has been written; see NeMo's.

        Raises:
            UserError: a save has failed.
        """
        with told_as_user_error(self._under_way):
            return super().maybe_finalize_save_checkpoint(blocking)


@contextlib.contextmanager
def told_as_user_error(directory: Path) -> Iterator[None]:
    """Turn what the file system says against saving a checkpoint into one line.

    It says how much room there is too: torch's writer reports a full disk as a wrong position.
    """
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
            f"The checkpoint {directory} could not be saved: {'; '.join(told)}. Earlier ones are "
            f"as they were."
        ) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
        return _reason(failures[0]) if failures else "another rank could not write"
    cause = error.__cause__
    if isinstance(cause, OSError):
        return _reason(cause)
    if "unexpected pos" in str(error):  # torch's writer, of a file that did not grow
        return "a file could not be written on (a full disk, a quota, or a limit on file sizes)"
    return str(error).rstrip(".")
