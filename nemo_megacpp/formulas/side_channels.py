"""What side channels send and save at one place of the stack. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_megacpp.formulas.collectives import Collective, there_and_back
from nemo_megacpp.formulas.saved import Saved
from nemo_megacpp.side_channels import channels_of

if TYPE_CHECKING:
    from nemo_megacpp.formulas.sizes import Sizes


def channel_collectives(sizes: Sizes, place: str) -> list[Collective]:
    """Return what a place sends in one microbatch: tables split over the vocabulary alone."""
    made: list[Collective] = []
    for channel in channels_of(sizes.config.side_channels, place):
        if channel.partition != "vocabulary":
            continue
        size = sizes.tokens * channel.embedding_width(sizes.h) * sizes.e
        what = f"embeddings of {channel.name}"
        if sizes.layout.sp:
            made += there_and_back("reduce_scatter", "all_gather", "tp", size, "sum", what)
        else:
            made.append(Collective("all_reduce", "tp", size, "forward", "sum", what))
    return made


def channel_activations(sizes: Sizes, place: str) -> list[Saved]:
    """Return what a place saves of one microbatch."""
    channels = channels_of(sizes.config.side_channels, place)
    split = [c for c in channels if c.partition == "vocabulary" and sizes.layout.tp > 1]
    saved = [Saved(f"{c.name}: ids and their mask", sizes.tokens * 9) for c in split]
    saved += [Saved(f"{c.name}: ids", sizes.tokens * 8) for c in channels if c not in split]
    if joined := joined_width(sizes, place):
        size = sizes.shared_tokens * (sizes.h + joined) * sizes.e
        saved.append(Saved("projection's joined input", size))
    return saved


def joined_width(sizes: Sizes, place: str) -> int:
    """Return how much wider than the stream the projection of a place is; 0 if it has none."""
    channels = channels_of(sizes.config.side_channels, place)
    return sum(c.embedding_width(sizes.h) for c in channels if c.combine == "concat")
