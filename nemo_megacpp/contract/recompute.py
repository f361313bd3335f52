"""What recompute saves and costs: activations kept and regained, and operations done again.

Between its forward and its backward pass a recomputed region keeps its input. While its backward
pass runs, it holds all that it saves without recompute as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.contract.stages import BuiltChunk, BuiltParameter
from nemo_megacpp.contract.work import one_depth, work_of
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.prediction import prediction_activations
from nemo_megacpp.formulas.recompute import MIXER_MODULES, recompute_units
from nemo_megacpp.formulas.saved import Saved, norm, total
from nemo_megacpp.formulas.side_channels import channel_activations
from nemo_megacpp.formulas.sizes import PREDICTION, Job, Sizes
from nemo_megacpp.pattern import Family
from nemo_megacpp.side_channels import is_channel_place


def saved_activations(sizes: Sizes, place: str) -> list[Saved]:
    """Return what one layer of a family, the embedding or the head saves of one microbatch, without
    the full recompute of layers."""
    tokens = sizes.tokens
    if place == "embedding":
        mask = tokens if sizes.layout.tp > 1 else 0
        return [Saved("token numbers and their mask", tokens * 8 + mask)]
    if place == "head":  # with the final norm and the loss
        return [
            *norm(sizes),
            Saved("probabilities of the vocabulary (float32)", tokens * sizes.vocabulary * 4),
            Saved("targets and their mask", tokens * 9),
        ]
    if place == PREDICTION:
        return prediction_activations(sizes, saved_activations(sizes, "head"))
    if is_channel_place(place):
        return channel_activations(sizes, place)
    formula = block_of(Family(place)).saved_activations
    assert formula is not None, "a job refuses a family without formulas"
    return [item for item in formula(sizes) if item.bytes]


def saved_bytes(sizes: Sizes) -> dict[str, int]:
    """Return the bytes of `saved_activations`, by place."""
    return {place: total(saved_activations(sizes, place)) for place in sizes.places}


@dataclass(frozen=True)
class ChunkActivations:
    """The activations of one microbatch in a pipeline chunk, in bytes.

    Attributes:
        kept: from its forward to its backward pass.
        peak: the most that is held while its backward pass runs, at least ``kept``.
    """

    kept: int
    peak: int


def _either(sizes: Sizes, without: Sizes, place: str) -> int:
    """Return the bytes of the tensors that a place saves with recompute, without, or both."""
    found: Counter[str] = Counter()
    for each in (sizes, without):
        once: Counter[str] = Counter()
        for item in saved_activations(each, place):
            once[item.what] += item.bytes
        found |= once  # the larger of both
    return found.total()


class Activations:
    """The saved activations of a job's layers, with recompute.

    Attributes:
        kept: bytes that a place keeps of one microbatch, if no whole layers are recomputed.
        whole: bytes that it holds while its backward pass runs.
        unit_input: bytes that a run of recomputed layers keeps.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._config = sizes.config
        self.kept = self.whole = saved_bytes(sizes)
        if self._config.recompute_granularity == "selective":
            plain = copy(self._config)
            plain.recompute_granularity = None
            without = Sizes(sizes.job, plain)
            self.whole = {place: _either(sizes, without, place) for place in sizes.places}
        self.unit_input = sizes.shared_tokens * sizes.h * sizes.e
        # The first norm saves the input itself, or a wide copy of it.
        copied = sizes.job.kernels == "torch" and sizes.e != sizes.wide
        self._beside = self.unit_input if copied else 0
        self._sums: dict[str, list[int]] = {}

    def chunk(self, places: Sequence[str], beside: Sequence[str] = ()) -> ChunkActivations:
        """Return what a chunk with these places holds.

        Args:
            places: of the chunk, in order.
            beside: the place of side channels at each of them; empty for none.
        """
        layers = [place for place in places if place not in ("embedding", "head")]
        channels = [self.whole.get(place, 0) for place in beside] or [0] * len(places)
        units = recompute_units(self._config, len(layers))
        first = "embedding" in places
        last = first + (units[-1].stop if units else 0)
        again = [self._unit([layers[layer] for layer in unit]) for unit in units]
        again = [
            (kept, during + sum(channels[first + layer] for layer in unit))
            for unit, (kept, during) in zip(units, again, strict=True)
        ]

        def stands(start: int, stop: int | None) -> Iterator[tuple[int, int]]:
            for place, extra in zip(places[start:stop], channels[start:stop], strict=True):
                yield self.kept[place] + extra, self.whole[place] + extra

        parts = [*stands(0, first), *again, *stands(last, None)]
        now = peak = 0
        for kept, during in parts:  # the backward pass meets them from the last to the first
            peak = max(peak, now + during)
            now += kept
        return ChunkActivations(now, max(now, peak))

    def at_most(self, letters: str, first: int, end: int) -> tuple[int, int]:
        """Return what layers ``first`` to ``end`` keep if they are a chunk, and a bound on what
        they regain in its backward pass; both grow with the layers."""
        units = recompute_units(self._config, end - first)
        done = first + (units[-1].stop if units else 0)
        kept = len(units) * self.unit_input + self._kept_between(letters, done, end)
        longest = max(map(len, units), default=0)
        modules = max(self.whole[layer] - self.kept[layer] for layer in {*letters})
        largest = max(self.whole[layer] for layer in {*letters})
        return kept, max(longest * largest + self._beside if units else 0, modules, 0)

    def _kept_between(self, letters: str, first: int, end: int) -> int:
        if letters not in self._sums:
            self._sums[letters] = [0, *accumulate(self.kept[layer] for layer in letters)]
        return self._sums[letters][end] - self._sums[letters][first]

    def _unit(self, layers: Sequence[str]) -> tuple[int, int]:
        """Return what layers that are recomputed together keep, and what they hold while their
        backward pass runs."""
        return self.unit_input, sum(self.whole[layer] for layer in layers) + self._beside


def recomputed_layers(sizes: Sizes, layers: str) -> str:
    """Return the families of the layers of a chunk that are recomputed as a whole."""
    units = recompute_units(sizes.config, len(layers))
    return layers[: units[-1].stop] if units else ""


def repeated_operations(sizes: Sizes, work: Mapping[str, int], chunks: Iterable[str]) -> int:
    """Return the operations for one token that recompute adds to the backward pass.

    Args:
        sizes: of the model on one rank, without any parallelism.
        work: of one layer of each family (:func:`nemo_megacpp.contract.work.work_of`).
        chunks: the families of each pipeline chunk's layers.
    """
    total = 0
    for layers in chunks:
        whole = recomputed_layers(sizes, layers)
        total += sum(work[layer] for layer in whole)
        total += sum(_of_modules(sizes, layer, work[layer]) for layer in layers[len(whole) :])
    return total


def recomputed_share(config: HybridConfig, chunks: Sequence[BuiltChunk]) -> float:
    """Return the operations that recompute adds to a step, as a share of its forward pass.

    Args:
        config: of the model, in its layout.
        chunks: all pipeline chunks, as they were built.
    """
    sizes = Sizes(Job({}), config)  # a job without parallelism
    places: dict[str, list[BuiltParameter]] = {}
    for chunk in chunks:
        for number, letter in chunk.numbered:
            if letter not in places:
                places[letter] = chunk.of_layer(number)
        if chunk.owns_head:
            places["head"] = chunk.of_end("head")
        if chunk.depths:
            places[PREDICTION] = one_depth(chunk)
    work = work_of(sizes, places)
    forward = sum(work[place] for chunk in chunks for place in chunk.places)
    return repeated_operations(sizes, work, [chunk.all_letters for chunk in chunks]) / forward


def _of_modules(sizes: Sizes, layer: str, work: int) -> int:
    """Return the operations of the modules of a layer that are recomputed. Those of norms and
    activation functions are not counted, as in all work."""
    if sizes.recomputes(MIXER_MODULES.get(layer, "")):
        return work
    if layer == "A" and sizes.recomputes("core_attn"):
        mixing = block_of(Family.ATTENTION).mixing
        assert mixing is not None
        return mixing(sizes)
    if layer == "E" and sizes.recomputes("shared_experts"):
        matrices = 3 if sizes.config.gated_linear_unit else 2
        return 2 * matrices * sizes.h * sizes.shared_expert_width
    return 0
