"""Which layers of a pipeline chunk ``recompute_granularity='full'`` recomputes. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

MIXER_MODULES = {"E": "moe", "M": "mamba", "R": "m2rnn", "F": "mlp"}
"""The module of ``recompute_modules`` that holds all matrices of a family's layer."""


def recompute_units(config: TransformerConfig, layers: int) -> list[range]:
    """Return the runs of layers of a chunk that are recomputed together, in order.

    As in Megatron's ``TransformerBlock``: ``uniform`` recomputes all layers, in runs of
    ``recompute_num_layers`` (the last may be shorter); ``block`` the first ``recompute_num_layers``
    layers of the chunk, one at a time. Every virtual stage is a chunk of its own.

    Args:
        config: of the model.
        layers: how many the chunk has.
    """
    if config.recompute_granularity != "full":
        return []
    count = config.recompute_num_layers
    assert count is not None, "the configuration is validated"
    if config.recompute_method == "block":
        return [range(layer, layer + 1) for layer in range(min(count, layers))]
    return [range(first, min(first + count, layers)) for first in range(0, layers, count)]


def described(config: TransformerConfig) -> str:
    """Return what is recomputed, for people; empty if nothing is."""
    count = config.recompute_num_layers
    if config.recompute_granularity == "selective":
        return ", ".join(config.recompute_modules or ())
    if config.recompute_granularity is None:
        return ""
    if config.recompute_method == "block":
        return f"the first {count} layers of each chunk"
    return "all layers, one at a time" if count == 1 else f"all layers, {count} at a time"
