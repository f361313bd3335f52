"""How long a rank computes one layer for one microbatch: rooflines by kind of work.

Of each matrix multiplication the longer of its arithmetic and its bytes counts, and at least the
time of a kernel, so that what TP makes small runs less efficiently. The rows of an expert are
padded to tiles, so that experts with few tokens do. What norms, activations and permutations move
follows from the activations that a layer saves. A recurrence takes its steps one after another,
however many ranks share it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_megacpp.contract.machine import Machine
from nemo_megacpp.contract.memory import GRADIENT_BYTES
from nemo_megacpp.contract.recompute import saved_activations
from nemo_megacpp.contract.stages import BuiltParameter
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.recompute import MIXER_MODULES
from nemo_megacpp.formulas.saved import total
from nemo_megacpp.formulas.side_channels import joined_width
from nemo_megacpp.formulas.sizes import PREDICTION, Sizes
from nemo_megacpp.pattern import Family
from nemo_megacpp.side_channels import channels_of, is_channel_place

_TILE = 128
"""Rows of a tile of a matrix multiplication."""
_LEAST_WIDTH = 16
"""A matrix with a narrower side holds a convolution's taps."""
_SAVED_FORWARD, _SAVED_BACKWARD = 2, 3
"""Times that the bytes of a saved activation move: written and read; read again, and its gradient
written and read."""
_KERNELS = 16
"""Kernels of a layer beside its matrix multiplications, forward; backward twice as many."""
_PERMUTED = 4
"""Permutations of the token copies in a pass of E: before and after both exchanges."""
_ATTENTION_BACKWARD = 2.5
"""Flash attention's operations of the backward pass over those of the forward pass."""


@dataclass(frozen=True)
class LayerTime:
    """Seconds that one rank computes one layer for one microbatch.

    Attributes:
        forward, backward: of the two passes, without what is computed again.
        again: what selective recomputation adds.
    """

    forward: float
    backward: float
    again: float


class LayerTimes:
    """The times of layers of a model on a machine.

    Args:
        machine: the machine.
        peak: operations a second of its GPUs, in the job's precision.
    """

    def __init__(self, machine: Machine, peak: float) -> None:
        self._machine = machine
        self._peak = peak
        self._moved = machine.hbm_bandwidth * machine.efficiency.memory

    def of(
        self, sizes: Sizes, place: str, parameters: Sequence[BuiltParameter], mixing: int
    ) -> LayerTime:
        """Return the time of one layer of a family, of the embedding, of the head, or of the side
        channels that are owned at one place.

        Args:
            sizes: the job in its layout.
            place: a family's letter, ``embedding``, ``head``, ``prediction`` or a place of side
                channels.
            parameters: of one such layer on the rank; not read for side channels.
            mixing: operations between tokens and on states, for one token of the whole model.
        """
        matrices = self._matrices(sizes, place, parameters)
        mixed = self._mixing(sizes, place, mixing)
        moved = self._elementwise(sizes, place)
        forward = matrices[0] + mixed[0] + moved[0]
        again = 0.0
        if sizes.recomputes(MIXER_MODULES.get(place, "")):
            again = forward
        elif place == Family.ATTENTION.value and sizes.recomputes("core_attn"):
            again = mixed[0]
        elif place == Family.EXPERT.value and sizes.recomputes("shared_experts"):
            shared = [p for p in parameters if ".shared_experts." in p.name]
            again = self._matrices(sizes, place, shared)[0]
        return LayerTime(forward, sum(matrices[1:]) + mixed[1] + moved[1], again)

    def _elementwise(self, sizes: Sizes, place: str) -> tuple[float, float]:
        """Return the seconds of what moves bytes and computes little, forward and backward."""
        saved = total(saved_activations(_without_recomputation(sizes), place))
        permuted = 0
        if is_channel_place(place):  # what is looked up, and then added or joined
            channels = channels_of(sizes.config.side_channels, place)
            saved += (
                sum(c.embedding_width(sizes.h) for c in channels) * sizes.shared_tokens * sizes.e
            )
        if place == Family.EXPERT.value:
            permuted = 2 * _PERMUTED * sizes.expert_rows * sizes.h * sizes.e
        least = _KERNELS * self._machine.kernel_seconds
        forward = (_SAVED_FORWARD * saved + permuted) / self._moved
        backward = (_SAVED_BACKWARD * saved + permuted) / self._moved
        return max(forward, least), max(backward, 2 * least)

    def _matrices(
        self, sizes: Sizes, place: str, parameters: Sequence[BuiltParameter]
    ) -> tuple[float, float, float]:
        """Return the seconds forward, for inputs' gradients, and for weights' gradients."""
        if place == "embedding":
            return 0.0, 0.0, 0.0  # a look-up: its bytes are those that it saves
        if is_channel_place(place):
            width = joined_width(sizes, place)  # of a projection that every tp rank has whole
            tokens, shape = sizes.shared_tokens, (sizes.h, sizes.h + width)
            return self._multiplied(sizes, tokens, 1, *shape) if width else (0.0, 0.0, 0.0)
        flat = [p.local_shape for p in parameters if not p.is_expert]
        shapes = [s for s in flat if len(s) == 2 and min(s) >= _LEAST_WIDTH]
        if place == "head":
            shapes = [(sizes.vocabulary, sizes.h)]  # also where it is the embedding
        elif place == PREDICTION:
            shapes.append((sizes.vocabulary, sizes.h))
        parts = [self._multiplied(sizes, sizes.tokens, 1, *shape) for shape in shapes]
        experts: Counter[tuple[int, ...]] = Counter()
        for parameter in parameters:
            if parameter.is_expert and len(parameter.local_shape) > 1:
                *stacked, rows, columns = parameter.local_shape
                experts[rows, columns] += stacked[0] if stacked else 1
        here = sizes.experts // sizes.layout.ep
        for (rows, columns), count in experts.items():
            each = self._multiplied(sizes, sizes.expert_rows / here, here, rows, columns)
            parts += [each] * (count // here)
        first, second, third = (sum(part[index] for part in parts) for index in range(3))
        return first, second, third

    def _multiplied(
        self, sizes: Sizes, tokens: float, experts: int, rows: int, columns: int
    ) -> tuple[float, float, float]:
        """Return the three multiplications of ``tokens`` by each of ``experts`` matrices."""
        efficiency, padded = self._machine.efficiency.matmul, tokens
        if experts > 1:
            efficiency = self._machine.efficiency.grouped_matmul
            padded = -(-tokens // _TILE) * _TILE
        computed = 2 * padded * rows * columns * experts / (self._peak * efficiency)
        weights = rows * columns * experts
        moved = (tokens * (rows + columns) * experts + weights) * sizes.e
        least = self._machine.kernel_seconds
        there = max(computed, moved / self._moved) + least
        # A weight's gradient is added to the float32 sum of the microbatches.
        moved += (2 * GRADIENT_BYTES - sizes.e) * weights
        return there, there, max(computed, moved / self._moved) + least

    def _mixing(self, sizes: Sizes, place: str, mixing: int) -> tuple[float, float]:
        """Return the seconds between tokens and on states, forward and backward."""
        efficiency = self._machine.efficiency
        is_attention = place == Family.ATTENTION.value
        sustained = efficiency.attention if is_attention else efficiency.scan
        forward = mixing * sizes.tokens / sizes.layout.tp / (self._peak * sustained)
        backward = forward * (_ATTENTION_BACKWARD if is_attention else 2)
        steps = 0
        if len(place) == 1 and (count := block_of(Family(place)).sequential_steps) is not None:
            steps = count(sizes)
        waiting = steps * self._machine.recurrent_token_seconds
        return max(forward, waiting), max(backward, 2 * waiting)


def _without_recomputation(sizes: Sizes) -> Sizes:
    """What moves does not shrink where less is saved."""
    if sizes.config.recompute_granularity is None:
        return sizes
    model = sizes.job.model.items()
    kept = {name: value for name, value in model if not name.startswith("recompute_")}
    return Sizes(dataclasses.replace(sizes.job, model=kept))
