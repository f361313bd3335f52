"""How much each part of a model computes: the weights that pipeline cuts are balanced by.

Unit: floating-point operations of the forward pass, for one token, in the whole model. The
backward pass doubles all of them alike, and TP, CP and EP divide them by the same degrees in every
stage, so that only their proportions matter. Counted are two operations for each weight that a
token meets (of the routed experts the share that it is sent to), and the mixing of tokens. What
takes time without arithmetic is not counted: norms, routing, communication, and the wait of R's
recurrence, whose steps follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_megacpp.contract.build import BuiltParameter
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.pattern import Family


@dataclass(frozen=True)
class Work:
    """Operations per token of each part.

    Attributes:
        families: of one layer, by letter.
        embedding: the look-up: one addition per element of its gradient.
        head: final norm, head and loss.
    """

    families: dict[str, int]
    embedding: int
    head: int


def work_of(sizes: Sizes, places: Mapping[str, Sequence[BuiltParameter]]) -> Work:
    """Return the work of each part.

    Args:
        sizes: of the model on one rank, without any parallelism.
        places: the whole parameters of one layer of each family, by letter, and of ``head``.
    """
    head = _matrices(sizes, places["head"])
    if sizes.config.share_embeddings_and_output_weights:
        head = 2 * sizes.vocabulary * sizes.h
    return Work(
        {
            letter: _matrices(sizes, parameters) + _mixing(sizes, letter)
            for letter, parameters in places.items()
            if letter not in ("embedding", "head")
        },
        sizes.h,
        head,
    )


def _matrices(sizes: Sizes, parameters: Sequence[BuiltParameter]) -> int:
    matrices = [p for p in parameters if len(p.local_shape) > 1]
    routed = sum(p.numel for p in matrices if p.is_expert)
    others = sum(p.numel for p in matrices if not p.is_expert)
    return 2 * others + (2 * routed * sizes.topk // sizes.experts if routed else 0)


def _mixing(sizes: Sizes, letter: str) -> int:
    """Operations between tokens, and on states."""
    mixing = block_of(Family(letter)).mixing
    return 0 if mixing is None else mixing(sizes)
