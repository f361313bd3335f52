"""The built-in corpus: the C++ headers that every torch installation carries."""

from __future__ import annotations

import fcntl
from pathlib import Path

from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.data.tokenizer import check_vocab_size
from nemo_megacpp.errors import UserError

MAX_BYTES = 20_000_000
"""Text taken from the headers: a few million tokens, prepared in seconds."""
MAX_VOCAB_SIZE = 32768
"""Half of the tokens that a BPE finds in that text (62,889 in torch 2.13's)."""


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

    Raises:
        UserError: a vocabulary that this text cannot yield; nothing is written.
    """
    from nemo_megacpp.data.corpus import torch_headers
    from nemo_megacpp.data.prepare import prepare

    if not (folder / "data.json").exists():
        check_vocab_size(vocab_size)
        if vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"The built-in corpus is enough text for a vocabulary of {MAX_VOCAB_SIZE}, not of "
                f"{vocab_size}. Prepare text of your own (nemo-megacpp data prepare PATH… --out "
                f"DIR) and give data=DIR, or choose a smaller vocab_size."
            )
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
