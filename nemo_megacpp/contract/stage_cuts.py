"""What crosses each pipeline cut, in bytes, and which cuts lie inside a seam.

The hidden states and the declared items (:mod:`nemo_megacpp.specs.payload`) go forward, and as many
bytes of gradient come back. Nothing else crosses: a scan's state ends inside its layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from nemo_megacpp.contract.pipeline_cuts import seam_at
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.pattern import Family
from nemo_megacpp.render import show_bytes
from nemo_megacpp.specs.payload import payload_at


class StageCut(NamedTuple):
    """One cut.

    Attributes:
        layer: global number of the layer after it, from 0.
        between: the letters before and after it, such as ``R|A``.
        items: bytes of one microbatch on one rank, forward, by name; in the order in which they
            lie. The gradient has as many.
        seam: why a cut here is dear; None for most.
    """

    layer: int
    between: str
    items: dict[str, int]
    seam: str | None

    @property
    def bytes(self) -> int:
        """Of everything that crosses, forward."""
        return sum(self.items.values())


def stage_cuts(sizes: Sizes, layers: Iterable[int]) -> list[StageCut]:
    """Return the cuts before the given layers, in order of depth.

    Args:
        sizes: of the job.
        layers: global number of the first layer of each chunk but the first.
    """
    letters, config = sizes.letters, sizes.config
    found = []
    for layer in sorted(layers):
        payload = payload_at(layer, letters, config, config)
        widths = {"hidden states": payload.hidden, **{i.name: i.width for i in payload.items}}
        items = {name: sizes.shared_tokens * n * sizes.e for name, n in widths.items()}
        message = payload.shape(sizes.shared_tokens // sizes.batch, sizes.batch)
        padding = math.prod(message) * sizes.e - sum(items.values())
        if padding:
            items["padding"] = padding
        cut = StageCut(layer, f"{letters[layer - 1]}|{letters[layer]}", items, None)
        seam = _seam(sizes, cut) if seam_at(letters, layer) else None
        found.append(cut._replace(seam=seam))
    return found


def _seam(sizes: Sizes, cut: StageCut) -> str:
    """Return what a cut inside a seam costs, as one line."""
    work = {
        Family.RECURRENT.value: f"the {sizes.config.seq_length:,} steps of R's recurrence",
        Family.EXPERT.value: "the exchange of E's tokens",
    }
    before, after = cut.between.split("|")
    return (
        f"Cut inside a seam: {cut.between} before layer {cut.layer}, {show_bytes(cut.bytes)} each "
        f"way a microbatch ({', '.join(cut.items)}; in turn, nothing overlaps: {work[before]}, the "
        f"message, {work[after]})"
    )
