"""Collectives of each place of a model: families by their declaration, embedding and head.

The tests hold them to recorded runs, collective by collective and byte by byte.
"""

from __future__ import annotations

from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.collectives import (
    Collective,
    between_several,
    column_parallel,
    there_and_back,
)
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.pattern import Family


def block_collectives(sizes: Sizes, family: Family) -> list[Collective]:
    """Return what one layer of ``family`` sends in one microbatch, forward and backward."""
    collectives = block_of(family).collectives
    assert collectives is not None, "a job refuses a family without a price"
    return between_several(sizes, collectives(sizes))


def embedding_collectives(sizes: Sizes) -> list[Collective]:
    """Return what the vocabulary-parallel embedding sends in one microbatch."""
    size, what = sizes.hidden_bytes, "embeddings of the rank's part of the vocabulary"
    if sizes.layout.sp:
        return between_several(
            sizes, there_and_back("reduce_scatter", "all_gather", "tp", size, "sum", what)
        )
    return between_several(sizes, [Collective("all_reduce", "tp", size, "forward", "sum", what)])


def head_collectives(sizes: Sizes) -> list[Collective]:
    """Return what the head and the vocabulary-parallel cross entropy send in one microbatch."""
    numbers = sizes.tokens * 4  # the loss is computed in float32
    return between_several(
        sizes,
        [
            *column_parallel(sizes, "final hidden states"),
            *(
                Collective("all_reduce", "tp", numbers, "forward", "sum", f"{what} of each token")
                for what in ("largest logit", "target's logit", "sum of exponentials")
            ),
        ],
    )
