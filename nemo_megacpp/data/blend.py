"""A blend of several folders of prepared data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError


def open_blend(blend: dict[str, float | None]) -> list[PreparedData]:
    """Open every folder of a blend.

    Raises:
        UserError: data that is missing or damaged, or made with another tokenizer than the first.
    """
    first, *others = opened = [PreparedData.open(Path(folder)) for folder in blend]
    for data in others:
        if data.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(
                f"{data.root} and {first.root} were made with different tokenizers, so their "
                f"tokens do not mean the same. Make one with the other's: nemo-megacpp data "
                f"prepare PATH… --out DIR --tokenizer {first.tokenizer_dir}"
            )
    return opened


def weighted_prefixes(prefixes: list[str], weights: Iterable[float | None]) -> list[str]:
    """Return prefixes as Megatron and NeMo take them: each after its weight, if they have any."""
    pairs = zip(weights, prefixes, strict=True)
    return [str(item) for pair in pairs for item in pair if item is not None]
