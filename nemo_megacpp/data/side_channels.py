"""The ids of side channels, beside the tokens of a document.

``data prepare`` writes each channel in Megatron's indexed format, ``SPLIT.NAME.bin/.idx``, with the
documents and the lengths of ``SPLIT.bin``: whatever row a dataset cuts from the tokens, it cuts the
same from a channel. The n-gram hash is written there too, and not computed from a row: a row may
begin amid a document, and the hash of its first tokens needs those before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemo_megacpp.side_channels import SideChannel

_SEED = np.uint64(0x9E3779B97F4A7C15)
_FACTOR = np.uint64(0xFF51AFD7ED558CCD)
_SHIFT = np.uint64(33)

Values = int | list[int]
"""What a JSONL line gives a channel: one id, or one per character of the text."""


def ngram_ids(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Hash the last ``n`` tokens at each token of one document.

    From the oldest to the newest of the ``n``, ``h ← mix((h xor t)·K mod 2^64)`` with ``t`` the
    token plus 1, or 0 before the document begins, and ``mix(h) = h xor (h >> 33)``; the id is
    ``h mod vocab_size``.

    Args:
        tokens: of the whole document, ``[tokens]``.
        n: at least 1.
        vocab_size: number of ids.

    Returns:
        int64 ``[tokens]``.
    """
    known = np.concatenate([np.zeros(n - 1, np.uint64), tokens.astype(np.uint64) + np.uint64(1)])
    state = np.full(len(tokens), _SEED)
    for age in range(n):
        state = (state ^ known[age : age + len(tokens)]) * _FACTOR
        state ^= state >> _SHIFT
    return (state % np.uint64(vocab_size)).astype(np.int64)


def read_values(
    record: Mapping[str, Any], text: str, channels: Sequence[SideChannel]
) -> dict[str, Values]:
    """Return what a JSONL line gives the channels that are read from fields.

    Raises:
        ValueError: what is wrong with the line.
    """
    found: dict[str, Values] = {}
    for channel in channels:
        if channel.field is None:
            continue
        if channel.field not in record:
            raise ValueError(f"has no field {channel.field!r} for side channel {channel.name}.")
        value = record[channel.field]
        ids = value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in ids):
            raise ValueError(
                f"has something else than an integer, or a list of integers, in field "
                f"{channel.field!r} for side channel {channel.name}."
            )
        if isinstance(value, list) and len(ids) != len(text):
            raise ValueError(
                f"has {len(ids):,} integers in field {channel.field!r} for side channel "
                f"{channel.name}, and a text of {len(text):,} characters: give one for each, or "
                f"one for the document."
            )
        if wrong := [item for item in ids if not 0 <= item < channel.vocab_size]:
            raise ValueError(
                f"has id {str(wrong[0])[:20]} in field {channel.field!r}; side channel "
                f"{channel.name} has ids 0 to {channel.vocab_size - 1}."
            )
        found[channel.name] = value
    return found


def document_ids(
    channel: SideChannel,
    values: Mapping[str, Values],
    tokens: np.ndarray,
    first_characters: Sequence[int],
) -> np.ndarray:
    """Return the ids of one document, ``[tokens]``.

    A token has the id of its first character, an end token that of the last character.

    Args:
        channel: which.
        values: of `read_values`.
        tokens: of the whole document, with its end tokens.
        first_characters: of each token but the end tokens, as the tokenizer reports them; only
            read where the line gives an id for each character.
    """
    if channel.ngram is not None:
        return ngram_ids(tokens, channel.ngram, channel.vocab_size)
    given = values[channel.name]
    if isinstance(given, int):
        return np.full(len(tokens), given)
    last = len(given) - 1
    places = np.minimum(np.asarray(first_characters, np.int64), last)
    ends = np.full(len(tokens) - len(places), last)
    return np.asarray(given, np.int64)[np.concatenate([places, ends])]
