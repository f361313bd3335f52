"""Saved activations of each place of a model: families by their declaration, embedding and head."""

from __future__ import annotations

from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.saved import Saved, norm
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.pattern import Family


def block_activations(sizes: Sizes, family: Family) -> list[Saved]:
    """Return what one layer of ``family`` saves of one microbatch."""
    saved_activations = block_of(family).saved_activations
    assert saved_activations is not None, "a job refuses a family without a price"
    return [item for item in saved_activations(sizes) if item.bytes]


def embedding_activations(sizes: Sizes) -> list[Saved]:
    """Return what the embedding saves of one microbatch."""
    mask = sizes.tokens if sizes.layout.tp > 1 else 0
    return [Saved("token numbers and their mask", sizes.tokens * 8 + mask)]


def head_activations(sizes: Sizes) -> list[Saved]:
    """Return what final norm, head and loss save of one microbatch."""
    tokens = sizes.tokens
    return [
        *norm(sizes),
        Saved("probabilities of the vocabulary (float32)", tokens * sizes.vocabulary * 4),
        Saved("targets and their mask", tokens * 9),
    ]
