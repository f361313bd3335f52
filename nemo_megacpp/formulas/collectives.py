"""What a collective is, and the patterns that several families share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from nemo_megacpp.layout.placement import group_size

if TYPE_CHECKING:
    from nemo_megacpp.formulas.sizes import Sizes

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "receive"]
Phase = Literal["forward", "backward", "recompute", "step"]
Role = Literal[
    "gather boundary",
    "layout transition",
    "sum",
    "dispatch",
    "routing",
    "hand-over",
    "pipeline",
    "gradient",
    "parameter",
]


@dataclass(frozen=True)
class Collective:
    """One collective of one rank.

    Attributes:
        kind: what is called; a point-to-point message is a ``send`` here and a ``receive`` there.
        group: between whom, a key of :data:`nemo_megacpp.layout.placement.GROUPS`.
        bytes: of the whole tensor: the input of an all-reduce or a reduce-scatter, the output of an
            all-gather, this rank's input of an all-to-all, the message of a send or receive.
        phase: when.
        role: what it is for. A *gather boundary* joins what tp splits; a *layout transition*
            changes which tokens or channels a cp rank holds.
        what: the tensor.
        count: how often, in one microbatch (in one step, if the phase is ``step``).
        neighbour: for messages along a group, how many places up the partner sits.
        once: made only where gradients are on, so that recompute does not repeat it.
    """

    kind: Kind
    group: str
    bytes: int
    phase: Phase
    role: Role
    what: str
    count: int = 1
    neighbour: int = 0
    once: bool = False

    def wire_bytes(self, size: int) -> float:
        """Bytes that leave this rank in all, in a ring (or direct) algorithm over ``size`` ranks.

        An all-reduce sends its tensor almost twice, a gather, scatter or exchange almost once; a
        receive is counted where it is sent.
        """
        factor = {"all_reduce": 2.0, "send": 0.0, "receive": 0.0}.get(self.kind, 1.0)
        if self.kind == "send":
            return float(self.bytes * self.count)
        return factor * self.bytes * self.count * (size - 1) / size


def between_several(sizes: Sizes, collectives: Iterable[Collective]) -> list[Collective]:
    """Drop what a group of one rank does not send, and what has no bytes."""
    return [c for c in collectives if group_size(sizes.layout, c.group) > 1 and c.bytes]


def again(collectives: Iterable[Collective]) -> list[Collective]:
    """Return the forward collectives as the backward pass repeats them when it recomputes."""
    forward = (c for c in collectives if c.phase == "forward" and not c.once)
    return [replace(c, phase="recompute") for c in forward]


def column_parallel(sizes: Sizes, what: str) -> list[Collective]:
    """The way into a tensor-parallel region: hidden states whole on every rank.

    Megatron's ``LinearWithGradAccumulationAndAsyncCommunication``: with SP the input is gathered,
    and gathered again for the weight's gradient instead of being saved.
    """
    size = sizes.hidden_bytes
    if not sizes.layout.sp:
        return [Collective("all_reduce", "tp", size, "backward", "sum", f"gradient of {what}")]
    return [
        Collective("all_gather", "tp", size, "forward", "gather boundary", what),
        Collective("all_gather", "tp", size, "backward", "gather boundary", what),
        Collective("reduce_scatter", "tp", size, "backward", "sum", f"gradient of {what}"),
    ]


def row_parallel(sizes: Sizes, what: str) -> list[Collective]:
    """The way out of a tensor-parallel region: partial sums become hidden states."""
    size = sizes.hidden_bytes
    if not sizes.layout.sp:
        return [Collective("all_reduce", "tp", size, "forward", "sum", what)]
    return [
        Collective("reduce_scatter", "tp", size, "forward", "sum", what),
        Collective("all_gather", "tp", size, "backward", "gather boundary", f"gradient of {what}"),
    ]


def replicated_weight(sizes: Sizes, numel: int, what: str) -> list[Collective]:
    """The sum over tp of a replicated parameter's gradient, where Megatron does not make it."""
    if sizes.layout.sp:
        return []
    return [
        Collective("all_reduce", "tp", numel * sizes.e, "backward", "sum", f"gradient of {what}")
    ]


def there_and_back(
    kind: Kind, reverse: Kind, group: str, size: int, role: Role, what: str
) -> list[Collective]:
    """A collective and, in the backward pass, its reverse with as many bytes."""
    return [
        Collective(kind, group, size, "forward", role, what),
        Collective(reverse, group, size, "backward", role, f"gradient of {what}"),
    ]


def exchange(sizes: Sizes, width: int, what: str) -> list[Collective]:
    """An all-to-all over cp of ``width`` channels of this rank's tokens."""
    size = sizes.tokens * width * sizes.e
    return there_and_back("all_to_all", "all_to_all", "cp", size, "layout transition", what)
