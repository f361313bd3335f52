"""Where a checkpoint keeps its weights: NeMo's folders, Megatron's, and bare ones."""

from __future__ import annotations

from pathlib import Path

from nemo_megacpp.checkpoint.safe_pickle import METADATA
from nemo_megacpp.errors import UserError

WEIGHTS = "weights"

_TRACKER = "latest_checkpointed_iteration.txt"


def find_weights(directory: Path) -> Path:
    """Return the folder with ``.metadata`` in it: ``directory`` itself, or its ``weights``.

    Raises:
        UserError: there is no such folder, or no distributed checkpoint in it.
    """
    for folder in (directory, directory / WEIGHTS):
        if (folder / METADATA).is_file():
            return folder
    if not directory.exists():
        raise UserError(f"There is no checkpoint at {directory}: there is no such folder.")
    if any((directory / name / "common.pt").exists() for name in ("", WEIGHTS)):
        raise UserError(
            f"The checkpoint {directory} is incomplete: its run ended while it was being saved "
            f"({METADATA} is missing)."
        )
    raise UserError(
        f"{directory} is no distributed checkpoint: it holds neither {METADATA} nor "
        f"{WEIGHTS}/{METADATA}."
    )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a person means by ``path``.

    It may be one (NeMo's, with ``weights/`` in it; Megatron's ``iter_0000100``; a bare folder of
    weights), the ``weights/`` of one, or the folder into which Megatron's script saves.

    Raises:
        UserError: there is none.
    """
    if path.name == WEIGHTS and (path / METADATA).is_file():
        return path.parent
    tracker = path / _TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdigit():
            raise UserError(f"{tracker} names no iteration: {text[:40]!r}.")
        path = path / f"iter_{int(text):07d}"
    find_weights(path)
    return path
