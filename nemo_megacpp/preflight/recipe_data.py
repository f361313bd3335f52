"""Validates the data of a recipe: complete, of the model's vocabulary, and divisible by CP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_megacpp.data.builtin import builtin_folder
from nemo_megacpp.data.prepared import CHECKSUMS, PreparedData, open_blend
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.side_channels import read_side_channels
from nemo_megacpp.specs.packs import validate_native_mamba


def open_data(recipe: Recipe) -> tuple[Recipe, list[PreparedData]]:
    """Open the recipe's data; the model takes its vocabulary unless the user gave another.

    Returns:
        The recipe with the vocabulary settled, and the data: one folder, or those of the blend;
        none for the built-in corpus before it is prepared.

    Raises:
        UserError: data that is missing, damaged, too short, or of another vocabulary or tokenizer;
            packed documents that cannot be split over CP.
    """
    if isinstance(recipe.data, dict):
        sources = open_blend(recipe.data)
    else:
        if recipe.data is None:
            _refuse_side_channels(recipe)
        folder = Path(recipe.data or builtin_folder(recipe.model["vocab_size"]))
        if recipe.data is None and not (folder / CHECKSUMS).exists():
            _validate_tokenizer(recipe, [])
            validate_packing(recipe, {folder: 1})
            return recipe, []
        sources = [PreparedData.open(folder)]
    _validate_tokenizer(recipe, sources)
    vocab_size = sources[0].vocab_size
    follows = recipe.data is not None and "vocab_size" not in recipe.given
    if follows and vocab_size != recipe.model["vocab_size"]:
        chosen = (*recipe.defaults, f"vocab_size: {vocab_size} (the data's)")
        model = {**recipe.model, "vocab_size": vocab_size}
        recipe = dataclasses.replace(recipe, model=model, defaults=chosen)
    channels = read_side_channels(recipe.model.get("side_channels"))
    for data in sources:
        data.validate_side_channels(channels)
        data.validate_samples(recipe.model["vocab_size"], recipe.model["seq_length"])
    validate_packing(recipe, {data.root: data.document_multiple for data in sources})
    return recipe, sources


def _refuse_side_channels(recipe: Recipe) -> None:
    """Raise a UserError for side channels without data that were prepared for them."""
    if channels := read_side_channels(recipe.model.get("side_channels")):
        options = (f"name={c.name},vocab_size={c.vocab_size},{c.source}" for c in channels)
        raise UserError(
            f"The model has side channels, and the built-in corpus has none. Prepare data: "
            f"nemo-megacpp data prepare PATH… --out DIR "
            f"{' '.join(f'--side-channel {option}' for option in options)}; then data=DIR."
        )


def _validate_tokenizer(recipe: Recipe, sources: list[PreparedData]) -> None:
    """Raise a UserError for data of another tokenizer than the recipe names."""
    if recipe.tokenizer is None:
        return
    if recipe.data is None:
        raise UserError(
            f"tokenizer={recipe.tokenizer} names the tokenizer of the data, but no data is given. "
            f"Prepare data with it: nemo-megacpp data prepare PATH… --out DIR --tokenizer "
            f"{recipe.tokenizer}; then data=DIR."
        )
    for data in sources:
        data.validate_tokenizer(recipe.tokenizer)


def validate_packing(recipe: Recipe, multiples: dict[Path, int]) -> None:
    """Raise a UserError for packed documents that cannot be split over the CP ranks.

    Args:
        recipe: to train.
        multiples: of how many tokens every document's length is a multiple, by folder.
    """
    cp = recipe.layout.cp
    if not recipe.training.packed_documents or cp == 1:
        return
    for folder, multiple in multiples.items():
        if multiple % (2 * cp):
            raise UserError(
                f"packed_documents with CP={cp}: each CP rank takes one chunk from either end of "
                f"every document, so a document needs a multiple of {2 * cp} tokens, but those of "
                f"{folder} have multiples of {multiple}. Prepare it with --document-multiple "
                f"{2 * cp} (the rows are then the same in every layout), or use CP=1."
            )
    native = "M" in recipe.pattern.letters and recipe.model.get("mode") != "mamba3"
    if native and current_host().device != "cpu":  # that host has what the mixer needs
        validate_native_mamba(cp)
