"""What a depth of multi-token prediction sends and saves beside its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.saved import Saved, norm

if TYPE_CHECKING:
    from nemo_megacpp.formulas.sizes import Sizes

_ROLLED = (
    ("tokens", 8),
    ("positions", 8),
    ("labels", 8),
    ("loss mask", 4),
    ("loss mask, for the weights", 4),
)
"""What is shifted by one token, and the bytes of an element. Over CP a rank passes on the first
element of each of its two chunks."""


def prediction_collectives(
    sizes: Sizes, embedding: Sequence[Collective], head: Sequence[Collective]
) -> list[Collective]:
    """Return what a depth sends in one microbatch, without its layers: Megatron's
    ``MultiTokenPredictionLayer`` and its part of ``process_mtp_loss``.

    Args:
        sizes: of the job.
        embedding, head: what the model's embedding and its head with the loss send, which a depth
            uses as well.
    """
    return [*embedding, *_projection(sizes), *head, *_accepted(sizes), *_over_cp(sizes)]


def _projection(sizes: Sizes) -> list[Collective]:
    """A column-parallel product of twice the width, whose output is gathered."""
    whole, both = sizes.hidden_bytes, 2 * sizes.hidden_bytes
    what = "embedding and hidden states"
    gathered = Collective("all_gather", "tp", whole, "forward", "gather boundary", "their product")
    if not sizes.layout.sp:
        summed = Collective("all_reduce", "tp", both, "backward", "sum", f"gradient of {what}")
        return [gathered, summed]
    back = "gradient of their product"
    return [
        Collective("all_gather", "tp", both, "forward", "gather boundary", what),
        gathered,
        Collective("all_gather", "tp", whole, "backward", "gather boundary", back),
        Collective("all_gather", "tp", both, "backward", "gather boundary", what),
        Collective("reduce_scatter", "tp", both, "backward", "sum", f"gradient of {what}"),
    ]


def _accepted(sizes: Sizes) -> list[Collective]:
    """How often the most probable token is the right one, which Megatron counts in every step."""
    every = sizes.tokens * sizes.layout.tp
    return [
        Collective("all_gather", "tp", every * bytes_each, "forward", "routing", what)
        for what, bytes_each in (("largest logit of the rank", sizes.e), ("its token", 8))
    ]


def _over_cp(sizes: Sizes) -> list[Collective]:
    made = []
    for what, each in _ROLLED:
        for place in (-1, 1):
            size = sizes.batch * each
            for kind, there in (("send", place), ("receive", place)):
                made.append(
                    Collective(kind, "cp", size, "forward", "hand-over", what, 1, there)  # type: ignore[arg-type]
                )
    counts = "unmasked tokens of the depth and of the loss"
    return [*made, Collective("all_reduce", "cp", 16, "forward", "sum", counts)]


def prediction_activations(sizes: Sizes, head: Sequence[Saved]) -> list[Saved]:
    """Return what a depth saves of one microbatch, without its layers.

    Args:
        sizes: of the job.
        head: what the head saves, with the norm before it and the loss.
    """
    of_one = [item for item in norm(sizes) if item.what != "norm: output"]
    joined = 2 * sizes.shared_tokens * sizes.h * sizes.e
    return [
        *of_one,
        *of_one,
        Saved("embedding and hidden states, joined", joined),
        Saved("token numbers", sizes.tokens * 8),
        *head,
    ]
