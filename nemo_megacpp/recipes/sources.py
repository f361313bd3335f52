"""What a recipe trains on: one folder of prepared data, or a blend of several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.host import current_host

if TYPE_CHECKING:
    from nemo_megacpp.recipes.recipe import Recipe

Sources = str | dict[str, float | None]
"""A folder, or weights by folder: all numbers, or all None for each by its size."""


def read_sources(value: Any) -> Sources | None:
    """Return the ``data`` of a recipe: a folder, a list, or weights by folder.

    A list may hold weights as Megatron's ``--data-path`` and NeMo's ``paths`` do, each before its
    folder; so may one string, ``0.7 code 0.3 prose``.

    Raises:
        UserError: an empty blend, a folder twice, weights that are no positive numbers, or one
            that may as well be a folder.
    """
    if isinstance(value, str) and len(value.split()) > 1 and not Path(value).exists():
        value = value.split()
    if isinstance(value, list):
        value = _read_list(value)
    if not isinstance(value, dict | str | None):
        raise UserError(
            f"data: {value!r} is neither a folder nor a blend; put a name in quotes that "
            f"YAML reads as something else."
        )
    if not isinstance(value, dict):
        return value
    if not value:
        raise UserError("data is an empty blend; name at least one folder, or leave it out.")
    blend = {_folder(folder): _weight(str(folder), weight) for folder, weight in value.items()}
    without = [folder for folder, weight in blend.items() if weight is None]
    if 0 < len(without) < len(blend):
        raise UserError(
            f"data: {', '.join(without)} has no weight and others have. Give all of them one, or "
            f"none: then each counts by its tokens."
        )
    return blend


def _read_list(items: list[Any]) -> dict[str, Any]:
    weighted = bool(items) and _number(items[0]) is not None
    if weighted and len(items) % 2:
        raise UserError(f"data: {items[-1]} stands alone; a weight goes before each folder.")
    for item in items[::2] if weighted else ():
        if Path(str(item)).is_dir():
            raise UserError(
                f"data: {item} stands where a weight goes, and is a folder too. Write ./{item} if "
                f"the folder is meant, or give weights by folder: {{FOLDER: 0.7, …}}."
            )
    weights = [_number(item) or item for item in items[::2]] if weighted else [None] * len(items)
    folders = [_folder(folder) for folder in (items[1::2] if weighted else items)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"data names {folder} twice; give it a weight instead.")
    return dict(zip(folders, weights, strict=True))


def _folder(name: Any) -> str:
    if name is None or not str(name).strip():
        raise UserError("data names a folder without a name; leave it out of the blend.")
    return str(name)


def _number(item: Any) -> float | None:
    try:
        return float(item)
    except (TypeError, ValueError):
        return None


def _weight(folder: str, weight: Any) -> float | None:
    if weight is None:
        return None
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise UserError(f"data: {folder} has the weight {weight!r}; it must be a positive number.")
    return float(weight)


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


def check_tokenizer_of(recipe: Recipe, sources: list[PreparedData]) -> None:
    """Refuse data of another tokenizer than the one that the recipe names.

    Raises:
        UserError: with both fingerprints.
    """
    if recipe.tokenizer is None:
        return
    if recipe.data is None:
        raise UserError(
            f"tokenizer={recipe.tokenizer} says what data must have been made with, and no data is "
            f"given. Make some with it: nemo-megacpp data prepare PATH… --out DIR --tokenizer "
            f"{recipe.tokenizer}; then data=DIR."
        )
    for data in sources:
        data.check_tokenizer(recipe.tokenizer)


def check_packing_of(recipe: Recipe, multiples: dict[Path, int]) -> None:
    """Refuse packed documents that context parallelism cannot deal to its ranks.

    Args:
        recipe: what is to be trained.
        multiples: of how many tokens every document is a multiple, by folder.

    Raises:
        UserError: with the legal choices.
    """
    cp = recipe.layout.cp
    if not recipe.training.packed_documents or cp == 1:
        return
    for folder, multiple in multiples.items():
        if multiple % (2 * cp):
            raise UserError(
                f"packed_documents with CP={cp}: each CP rank takes one chunk from either end of "
                f"every document, so a document needs a multiple of {2 * cp} tokens, and those of "
                f"{folder} have multiples of {multiple}. Prepare it with --document-multiple "
                f"{2 * cp} (the rows are then the same in every layout), or use CP=1."
            )
    native = "M" in recipe.pattern.letters and recipe.model.get("mode") != "mamba3"
    if native and current_host().device != "cpu":  # that host brings what Megatron's mixer asks for
        from nemo_megacpp.specs.packs import refuse_native_mamba

        refuse_native_mamba(cp)
