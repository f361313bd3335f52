"""The tokenizer of an export."""

from __future__ import annotations

from pathlib import Path

from nemo_megacpp.data.tokenizer import (
    PAD_TOKEN,
    LoadedTokenizer,
    copy_tokenizer,
    load_tokenizer,
)
from nemo_megacpp.errors import UserError

_FILE = "tokenizer.json"
_OF_DATA = "tokenizer"


def find_tokenizer(
    folder: Path | None, fingerprint: str | None, vocab_size: int
) -> LoadedTokenizer | None:
    """Return the tokenizer that goes with a checkpoint; None where no folder is given.

    Args:
        folder: of ``tokenizer.json``, or prepared data.
        fingerprint: of the tokenizer that the model was trained with; None: not known.
        vocab_size: of the model, without padding.

    Raises:
        UserError: there is no tokenizer, or it is another one.
    """
    if folder is None:
        return None
    inside = folder / _OF_DATA
    if not (folder / _FILE).exists() and (inside / _FILE).exists():
        folder = inside
    loaded = load_tokenizer(folder)
    if fingerprint is not None and loaded.fingerprint != fingerprint:
        raise UserError(
            f"{folder} is another tokenizer than that of the checkpoint's data: "
            f"{loaded.fingerprint[:12]}… here, {fingerprint[:12]}… there."
        )
    if loaded.vocab_size > vocab_size:
        raise UserError(
            f"{folder} has {loaded.vocab_size} tokens, and the model's vocabulary {vocab_size}."
        )
    return loaded


def token_fields(loaded: LoadedTokenizer) -> dict[str, int]:
    """Return the ids of the special tokens as ``config.json`` names them."""
    pad = loaded.tokenizer.token_to_id(PAD_TOKEN)
    return {"eos_token_id": loaded.eos_id, "pad_token_id": loaded.eos_id if pad is None else pad}


def write_tokenizer(loaded: LoadedTokenizer, folder: Path) -> None:
    """Write the files that ``AutoTokenizer`` loads."""
    copy_tokenizer(loaded.folder, folder)
