"""The built-in corpus: the C++ headers that every torch installation carries."""

from __future__ import annotations

import fcntl
from pathlib import Path

from nemo_megacpp.data.prepared import PreparedData

MAX_BYTES = 20_000_000
"""Text taken from the headers: a few million tokens, prepared in seconds."""


def builtin_folder(vocab_size: int) -> Path:
    """Return where the built-in corpus with a vocabulary of this size is kept: ``data/`` here."""
    return Path("data") / f"torch-headers-{vocab_size}"


def ensure_builtin(folder: Path, vocab_size: int, progress: bool = True) -> PreparedData:
    """Open the built-in corpus, and prepare it first if it is not there.

    Several ranks may call at once: one prepares, the others wait for it.

    Args:
        folder: normally :func:`builtin_folder`.
        vocab_size: size of the byte-level BPE vocabulary.
        progress: show a progress bar.
    """
    from nemo_megacpp.data.corpus import torch_headers
    from nemo_megacpp.data.prepare import prepare

    if not (folder / "data.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "data.json").exists():
                prepare(
                    [torch_headers()],
                    folder,
                    vocab_size=vocab_size,
                    max_bytes=MAX_BYTES,
                    progress=progress,
                )
    return PreparedData.open(folder)
