"""The tokenizer of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.data.checkpoint_tokenizer import find_tokenizer
from nemo_megacpp.data.tokenizer import PAD_TOKEN, LoadedTokenizer, copy_tokenizer
from nemo_megacpp.errors import UserError


@dataclass(frozen=True)
class Choice:
    """Which tokenizer an export has.

    Attributes:
        folder: the user's choice: of ``tokenizer.json``, or prepared data; None: that of the data
            the checkpoint was trained on.
        near: folders of prepared data to look into for that.
        none: leave it out.
    """

    folder: Path | None = None
    near: Sequence[Path] = ()
    none: bool = False


FIND = Choice()
NONE = Choice(none=True)


def tokenizer_of_export(content: CheckpointContent, choice: Choice) -> LoadedTokenizer | None:
    """Return the tokenizer that goes into an export; None where it was left out, or where the
    checkpoint does not know of one: it was trained on other data than prepared ones.

    Raises:
        UserError: there is no such tokenizer, or it is another one than the checkpoint's.
    """
    assert content.identity is not None
    if choice.none or (choice.folder is None and content.identity["tokenizer"] is None):
        return None
    words = content.identity["model"]["vocab_size"]
    try:
        return find_tokenizer(content, words, choice.folder, choice.near)
    except UserError as error:
        if choice.folder is not None:
            raise
        raise UserError(f"{error} Or --no-tokenizer exports the model without one.") from None


def token_fields(loaded: LoadedTokenizer) -> dict[str, int]:
    """Return the ids of the special tokens as ``config.json`` names them."""
    pad = loaded.tokenizer.token_to_id(PAD_TOKEN)
    return {"eos_token_id": loaded.eos_id, "pad_token_id": loaded.eos_id if pad is None else pad}


def write_tokenizer(loaded: LoadedTokenizer, folder: Path) -> None:
    """Write the files that ``AutoTokenizer`` loads."""
    copy_tokenizer(loaded.folder, folder)
