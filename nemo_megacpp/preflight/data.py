"""The data of a recipe: there, whole, of the model's vocabulary, and dealt by CP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_megacpp.data.blend import open_blend
from nemo_megacpp.data.builtin import builtin_folder
from nemo_megacpp.data.prepared import MANIFEST, PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.specs.packs import validate_native_mamba


def open_data(recipe: Recipe) -> tuple[Recipe, list[PreparedData]]:
    """Open the recipe's data; the model takes its vocabulary unless the user gave another.

    Returns:
        The recipe with the vocabulary settled, and the data: one folder, or those of the blend;
        none for a built-in corpus that is yet to be prepared.

    Raises:
        UserError: data that is missing, unreadable, damaged, too short, of another vocabulary or
            of another tokenizer than asked; a blend of several; packed documents that CP cannot
            deal.
    """
    if isinstance(recipe.data, dict):
        sources = open_blend(recipe.data)
    else:
        folder = Path(recipe.data or builtin_folder(recipe.model["vocab_size"]))
        if recipe.data is None and not (folder / MANIFEST).exists():
            _validate_tokenizer(recipe, [])
            validate_packing(recipe, {folder: 1})
            return recipe, []
        sources = [PreparedData.open(folder)]
    _validate_tokenizer(recipe, sources)
    data = sources[0]
    if data.vocab_size != recipe.model["vocab_size"]:
        if recipe.data is None or "vocab_size" in recipe.given:
            raise UserError(
                f"{data.root} was made with a vocabulary of {data.vocab_size}, and vocab_size="
                f"{recipe.model['vocab_size']} was asked for. Leave vocab_size out, or prepare the "
                f"data with --vocab-size {recipe.model['vocab_size']}."
            )
        model = {**recipe.model, "vocab_size": data.vocab_size}
        chosen = (*recipe.defaults, f"vocab_size: {data.vocab_size} (the data's)")
        recipe = dataclasses.replace(recipe, model=model, defaults=chosen)
    for source in sources:
        for split, counts in source.splits.items():
            if counts.tokens <= recipe.model["seq_length"]:
                raise UserError(
                    f"The {split} split of {source.root} has {counts.tokens} tokens; one sample of "
                    f"seq_length={recipe.model['seq_length']} needs one more than that."
                )
    validate_packing(recipe, {data.root: data.document_multiple for data in sources})
    return recipe, sources


def _validate_tokenizer(recipe: Recipe, sources: list[PreparedData]) -> None:
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


def validate_packing(recipe: Recipe, multiples: dict[Path, int]) -> None:
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
        validate_native_mamba(cp)
