"""The built-in corpus: the C++ headers of the torch installation, prepared once per user."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from nemo_megacpp.data.prepared import CHECKSUMS, PreparedData
from nemo_megacpp.data.staging import lock_file
from nemo_megacpp.data.tokenizer import check_vocab_size
from nemo_megacpp.errors import UserError

MAX_BYTES = 20_000_000
"""Text taken from the headers: a few million tokens, prepared in seconds."""
MAX_VOCAB_SIZE = 32768
"""Half of the tokens that a BPE finds in that text (62,889 in torch 2.13's)."""


def builtin_folder(vocab_size: int) -> Path:
    """Return the folder of the built-in corpus with a vocabulary of this size.

    It lies in the user's cache: ``$XDG_CACHE_HOME/nemo_megacpp``, by default
    ``~/.cache/nemo_megacpp``.
    """
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    return _cache() / f"torch-{torch}-headers-{vocab_size}"


def builtin_folders(vocab_size: int) -> list[Path]:
    """Return the built-in corpora of this user with a vocabulary of this size, also those of other
    installations of torch, whose headers differ; that of this one is the first."""
    own = builtin_folder(vocab_size)
    others = sorted(_cache().glob(f"torch-*-headers-{vocab_size}"))
    return [own, *(folder for folder in others if folder != own)]


def _cache() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is ignored, by its standard
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "nemo_megacpp"


def torch_headers() -> Path:
    """Return the folder of C++ headers in the installed torch, without importing torch.

    Raises:
        UserError: torch or its headers are not installed.
    """
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("torch is not installed, so its C++ headers cannot be the corpus.")
    folder = Path(next(iter(spec.submodule_search_locations))) / "include"
    if not folder.is_dir():
        raise UserError(f"This torch has no C++ headers: {folder} is missing.")
    return folder


def ensure_builtin(vocab_size: int, progress: bool = True) -> PreparedData:
    """Open the built-in corpus, and prepare it first if it is missing.

    Ranks of several nodes may call this at once: one prepares it, the others wait.

    Args:
        vocab_size: size of the byte-level BPE vocabulary.
        progress: draw a progress bar.

    Raises:
        UserError: this text does not yield such a vocabulary (nothing is written then), or the
            cache cannot be written.
    """
    from nemo_megacpp.data.prepare import prepare

    folder = builtin_folder(vocab_size)
    if not (folder / CHECKSUMS).exists():
        check_vocab_size(vocab_size)
        if vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"The built-in corpus is enough text for a vocabulary of {MAX_VOCAB_SIZE}, not of "
                f"{vocab_size}. Prepare text of your own (nemo-megacpp data prepare PATH… --out "
                f"DIR) and give data=DIR, or choose a smaller vocab_size."
            )
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with lock_file(folder.with_name(f".{folder.name}.once")):
                if not (folder / CHECKSUMS).exists():
                    prepare(
                        [torch_headers()],
                        folder,
                        vocab_size=vocab_size,
                        max_bytes=MAX_BYTES,
                        overwrite=True,  # of an older version, without checksums
                        progress=progress,
                    )
        except OSError as error:
            raise UserError(
                f"Cannot write the built-in corpus to {folder}: {error.strerror}. Set "
                f"XDG_CACHE_HOME to a folder that can be written, or give data=DIR."
            ) from error
    return PreparedData.open(folder)
