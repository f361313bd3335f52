"""The layers of a hybrid model, in order, with the places where its pipeline may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern.family import BUILT_IN, Family
from nemo_megacpp.pattern.text import CUT, MTP, MegatronArgument, join, scan

MAX_DEPTH = 65_536
"""Layers that a pattern is tiled to: a thousand times those of any model."""
_STAND_IN = "M"
"""Written for a family that ``hybrid_layer_pattern`` has no symbol for. A recurrent mixer is
nearest to Mamba, and Megatron counts nothing by ``M`` but its estimate of FLOP/s."""


@dataclass(frozen=True)
class HybridPattern:
    """The families of all layers, the explicit pipeline cuts, and multi-token prediction.

    Attributes:
        families: one family per layer, ``len(families)`` = depth.
        cuts: global layer indices before which a new pipeline chunk starts, strictly increasing,
            ``0 < cut < depth``. Empty: the pipeline divides the depth equally.
        mtp_families: the layers of each multi-token prediction depth, the same for all; they come
            after the last layer and are not part of the depth.
        mtp_num_depths: how many tokens beyond the next one are predicted.

    Raises:
        UserError: no layers, cuts out of order or out of range, or prediction depths without
            layers.
    """

    families: tuple[Family, ...]
    cuts: tuple[int, ...] = ()
    mtp_families: tuple[Family, ...] = ()
    mtp_num_depths: int = 0

    def __post_init__(self) -> None:
        if not self.families:
            raise UserError("A pattern needs at least one layer.")
        if bool(self.mtp_families) != (self.mtp_num_depths > 0):
            raise UserError(
                f"{self.mtp_num_depths} multi-token prediction depths of "
                f"{len(self.mtp_families)} layers: give both, or neither."
            )
        edges = (0, *self.cuts, len(self.families))
        if any(low >= high for low, high in pairwise(edges)):
            raise UserError(
                f"Pipeline cuts must be strictly increasing, between 1 and "
                f"{len(self.families) - 1} for {len(self.families)} layers; got {self.cuts}."
            )

    @classmethod
    def parse(cls, text: str, depth: int | None = None) -> HybridPattern:
        """Read a pattern, and tile it to ``depth`` layers if a depth is given.

        Args:
            text: letters A, M, E, R, F in either case, Megatron's ``*`` for A and ``-`` for F, or
                the long names (``ablock, eblock``); whitespace is ignored, ``|`` is a pipeline cut.
                After the layers, ``/`` and the layers of a multi-token prediction depth, once for
                each depth: ``AEMR/AE/AE``.
            depth: number of layers. ``text`` is then a unit that repeats, with its cuts, until
                ``depth`` layers exist; the last repeat is truncated. A ``|`` at the unit's end cuts
                after each repeat; one that falls on the end of the stack separates nothing and is
                left out. What comes after a ``/`` does not repeat.

        Raises:
            UserError: an unknown letter, a cut that separates nothing, no layers, prediction depths
                that are not alike, or a depth below the unit's length (a family of the unit could
                vanish).
        """
        unit, cuts, mtp_families, mtp_num_depths = scan(text, tiled=depth is not None)
        if depth is None:
            return cls(unit, cuts, mtp_families, mtp_num_depths)
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise UserError(f"The depth must be a positive number of layers; got {depth!r}.")
        if depth > MAX_DEPTH:
            raise UserError(f"A depth of {depth:,} is more than {MAX_DEPTH:,} layers.")
        if depth < len(unit):
            raise UserError(
                f"A depth of {depth} cuts short the unit {join(unit, cuts)!r} of {len(unit)} "
                f"layers, and a family could vanish. Use a depth of at least {len(unit)}, or write "
                f"the shorter pattern out."
            )
        repeats = -(-depth // len(unit))
        return cls(
            (unit * repeats)[:depth],
            tuple(
                position
                for repeat in range(repeats)
                for cut in cuts
                if (position := repeat * len(unit) + cut) < depth
            ),
            mtp_families,
            mtp_num_depths,
        )

    @classmethod
    def from_megatron(cls, text: str, argument: MegatronArgument) -> HybridPattern:
        """Read Megatron's symbols, as `to_megatron` writes them.

        They have one case, and the letters ``A`` and ``F`` are not among them. Both languages have
        ``*``, ``M``, ``E`` and ``-``; a ``hybrid_override_pattern`` for our stack also has ``R``,
        the letters of added families, and ``|``; a ``hybrid_layer_pattern`` has ``|`` and ``/``.

        Args:
            text: the argument's value.
            argument: which of Megatron's arguments it is.

        Raises:
            UserError: as `parse`, for any other symbol; ``G``, ``D`` and ``+`` among them, which
                stand for layers that this package has no family for.
        """
        return cls(*scan(text, megatron=argument))

    def to_megatron(
        self, argument: MegatronArgument, *, cuts: bool = False, stand_ins: bool = False
    ) -> str:
        """Return the value of one of Megatron's arguments: one symbol per layer.

        Args:
            argument: which one.
            cuts: write ``|`` at the cuts. Megatron-Core 0.16.1 counts characters as layers and does
                not know ``|``, so it gets the form without.
            stand_ins: in a ``hybrid_layer_pattern``, write ``M`` for families that it has no symbol
                for. Megatron then counts the layers right; what they are has to travel elsewhere
                (:mod:`nemo_megacpp.specs.named`).

        Raises:
            UserError: the language has no symbol for a family, or none for multi-token prediction.
        """
        text = join(self.families, self.cuts if cuts else (), megatron=True)
        if argument == "hybrid_override_pattern":
            if self.mtp_num_depths:
                raise UserError(
                    f"hybrid_override_pattern has no multi-token prediction; this pattern has "
                    f"{self.mtp_num_depths} depths of it."
                )
            return text
        text += (MTP + join(self.mtp_families, (), megatron=True)) * self.mtp_num_depths
        foreign = {f.value for f in (*self.families, *self.mtp_families) if not f.is_megatrons}
        if foreign and not stand_ins:
            raise UserError(
                f"Megatron's hybrid_layer_pattern has no symbol for {', '.join(sorted(foreign))}."
            )
        return text.translate({ord(letter): _STAND_IN for letter in foreign})

    @property
    def letters(self) -> str:
        """One upper-case letter per layer, without cuts."""
        return join(self.families, ())

    @property
    def all_families(self) -> tuple[Family, ...]:
        """The families of all layers, those of every prediction depth included."""
        return self.families + self.mtp_families * self.mtp_num_depths

    @property
    def mtp_letters(self) -> str:
        """One upper-case letter per layer of a prediction depth."""
        return join(self.mtp_families, ())

    @property
    def uncut(self) -> str:
        """The canonical form without cuts: what a model is, however its pipeline is cut."""
        return self.letters + (MTP + self.mtp_letters) * self.mtp_num_depths

    def __str__(self) -> str:
        """The canonical form: upper-case letters with cuts. `parse` reads it back."""
        mtp = MTP + self.mtp_letters
        return join(self.families, self.cuts) + mtp * self.mtp_num_depths

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.families)

    def counts(self) -> dict[Family, int]:
        """The number of layers of each built-in family, zeros included, and of others that are
        there."""
        families = dict.fromkeys((*BUILT_IN, *self.families))
        return {family: self.families.count(family) for family in families}

    def chunks(self, n: int) -> tuple[range, ...]:
        """The global layer indices of each of ``n`` pipeline chunks, in depth order.

        Args:
            n: pipeline stages times virtual stages.

        One chunk is always legal: a cut is a place where the pipeline may be cut, so a model with
        cuts still loads on a single rank. For more, explicit cuts must make exactly ``n`` chunks;
        without them ``n`` must divide the depth. Nothing is rounded; Megatron-Core 0.16.1 silently
        builds only ``n * (depth // n)`` layers.

        Raises:
            UserError: ``n`` chunks cannot be made; names the legal numbers.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise UserError(f"The number of pipeline chunks must be a positive integer; got {n!r}.")
        depth = len(self)
        if n == 1:
            return (range(depth),)
        if self.cuts:
            chunks = _ranges((0, *self.cuts, depth))
            if len(chunks) != n:
                raise UserError(
                    f"The pattern is cut into {len(chunks)} pipeline chunks "
                    f"({_sizes(chunks)} layers), but the layout has {n} (pipeline x virtual "
                    f"stages). Legal: 1 or {len(chunks)}; or write {n - 1} cuts "
                    f"({CUT!r}) instead of {len(self.cuts)}."
                )
            return chunks
        if depth % n == 0:
            return _ranges(tuple(range(0, depth + 1, depth // n)))
        raise UserError(
            f"{depth} layers cannot be divided into {n} equal pipeline chunks. "
            f"Legal numbers of chunks: {', '.join(map(str, _divisors(depth)))}{self._advice(n)}"
        )

    def cut_into(self, n: int) -> HybridPattern:
        """Return the pattern with a cut before each of ``n`` chunks but the first, and no other.

        Raises:
            UserError: as `chunks`.
        """
        starts = tuple(chunk.start for chunk in self.chunks(n)[1:])
        return HybridPattern(self.families, starts, self.mtp_families, self.mtp_num_depths)

    def _advice(self, n: int) -> str:
        if n > len(self):
            return "."
        edges = _balanced(len(self), n)
        return (
            f"; or choose the cuts yourself, for example {join(self.families, edges[1:-1])!r} "
            f"({_sizes(_ranges(edges))} layers)."
        )


def _ranges(edges: tuple[int, ...]) -> tuple[range, ...]:
    return tuple(range(low, high) for low, high in pairwise(edges))


def _sizes(chunks: tuple[range, ...]) -> str:
    return "+".join(str(len(chunk)) for chunk in chunks)


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _balanced(depth: int, n: int) -> tuple[int, ...]:
    """Edges of ``n`` chunks whose sizes differ by one at most.

    The larger ones go to the middle: the first and last stages also hold embedding, head and loss.
    """
    size, extra = divmod(depth, n)
    first = (n - extra) // 2
    edges = [0]
    for chunk in range(n):
        edges.append(edges[-1] + size + (first <= chunk < first + extra))
    return tuple(edges)
