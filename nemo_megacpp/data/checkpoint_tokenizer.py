"""The tokenizer that a checkpoint's ids belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.data.builtin import builtin_folders
from nemo_megacpp.data.tokenizer import LoadedTokenizer, fingerprint, has_tokenizer, load_tokenizer
from nemo_megacpp.errors import UserError

_OF_DATA = "tokenizer"
_SHOWN = 12
"""Digits of a fingerprint in a message."""
GIVE = "give --tokenizer DIR, a tokenizer's folder or that of the prepared data."


def find_tokenizer(
    content: CheckpointContent,
    vocab_size: int,
    given: Path | None = None,
    near: Sequence[Path] = (),
) -> LoadedTokenizer:
    """Return the tokenizer that a checkpoint's model was trained with.

    Args:
        content: the checkpoint; its identity names the tokenizer by its fingerprint.
        vocab_size: of the model, without padding.
        given: the user's choice: a tokenizer's folder, or prepared data with one.
        near: such folders to look into where none is given
            (:func:`nemo_megacpp.runs.run_data.data_of_run`); after them the built-in corpora of
            this machine are looked into.

    Raises:
        UserError: there is none, or it is another one than the checkpoint's.
    """
    trained = content.identity and content.identity["tokenizer"]
    if given is None:
        given = _search(content, trained, [*near, *builtin_folders(vocab_size)])
    tokenizer = load_tokenizer(_folder(given))
    if trained is not None and trained != tokenizer.fingerprint:
        raise UserError(
            f"{content.directory} was trained with another tokenizer ({trained[:_SHOWN]}) than "
            f"that of {tokenizer.folder} ({tokenizer.fingerprint[:_SHOWN]}): its ids would mean "
            f"other text. {GIVE[0].upper()}{GIVE[1:]}"
        )
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"The tokenizer of {tokenizer.folder} has {tokenizer.vocab_size:,} tokens, and the "
            f"model {vocab_size:,}: it was trained with another tokenizer."
        )
    return tokenizer


def _folder(given: Path) -> Path:
    inside = given / _OF_DATA
    return inside if has_tokenizer(inside) else given


def _search(content: CheckpointContent, trained: str | None, folders: Sequence[Path]) -> Path:
    """Return the first folder with the tokenizer; with any, where the checkpoint names none."""
    there = [folder for folder in map(_folder, folders) if has_tokenizer(folder)]
    for folder in there:
        if trained is None or fingerprint(folder) == trained:
            return folder
    which = f" ({trained[:_SHOWN]})" if trained else ""
    looked = ", ".join(map(str, there)) or "no other folder is known"
    raise UserError(
        f"The tokenizer of {content.directory}{which} is neither in the data that its run names "
        f"nor in the built-in corpus of this machine ({looked}): {GIVE}"
    )
