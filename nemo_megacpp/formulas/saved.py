"""Saved activations: what autograd saves of one microbatch for the backward pass.

Each entry names a tensor and gives its bytes on one rank. The ``torch`` entries follow the plain
torch modules and kernels and are held to recorded runs. The ``gpu`` entries follow what Transformer
Engine's and mamba_ssm's autograd functions save; no GPU has confirmed them yet. Routing is data:
E's entries are those of balanced routing.

What a module saves is left out where ``recompute_modules`` names it; the full recompute of layers
is counted from these entries (:mod:`nemo_megacpp.contract.recompute`). Not counted for either:
tensors that live only inside a kernel or between two operations, and what an allocator rounds up or
cannot reuse.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nemo_megacpp.formulas.sizes import Sizes


class Saved(NamedTuple):
    """A tensor that is saved for the backward pass.

    Attributes:
        what: its name.
        bytes: on one rank.
    """

    what: str
    bytes: int


def norm(sizes: Sizes) -> list[Saved]:
    """Return what an RMS norm over ``h`` saves, and its output, which the next linear saves."""
    tokens, h = sizes.shared_tokens, sizes.h
    # torch composes the norm, and saves the wide input and its product with the scale.
    width = sizes.e if sizes.job.kernels == "gpu" else 2 * sizes.wide
    return [
        Saved("norm: input", tokens * h * width),
        Saved("norm: scale of each token", tokens * 4),
        Saved("norm: output", tokens * h * sizes.e),
    ]


def inside_mlp(sizes: Sizes) -> int:
    """Return the FFN widths that an MLP saves: gate and value as projected, and what leads to their
    product.

    The torch form saves the projection (2), the value plus its offset, the activated gate, and the
    product that the second matrix takes; a fused form the projection and the product.
    """
    if sizes.config.gated_linear_unit:
        return 5 if sizes.job.kernels == "torch" else 3
    return 2


def total(saved: Iterable[Saved]) -> int:
    """Return the bytes of all entries."""
    return sum(item.bytes for item in saved)
