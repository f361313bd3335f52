"""The memory of each pipeline stage: exact bytes of what is allocated, formulas for what is kept.

Parameters, gradients and the optimizer are exact. Activations are formulas
(:mod:`nemo_megacpp.contract.activations`), times the microbatches in flight of Megatron's schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_megacpp.contract.activations import (
    block_activations,
    embedding_activations,
    head_activations,
)
from nemo_megacpp.contract.buffers import (
    GRADIENT_BYTES,
    Buffer,
    buffers_of,
    largest_optimizer_bytes,
)
from nemo_megacpp.contract.build import BuiltChunk, BuiltStage
from nemo_megacpp.formulas.job import Job
from nemo_megacpp.formulas.saved import Saved, total
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.pattern import Family


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the rank of a stage that holds most.

    Attributes:
        parameters, gradients: as allocated, with the distributed optimizer's padding.
        optimizer: float32 parameters and Adam's state, on the rank that owns most.
        activations: the peak over the schedule, by formula.
        activations_per_microbatch: of all the stage's chunks, by formula.
        in_flight: most microbatches whose activations a chunk holds at once, in order of depth.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    activations_per_microbatch: int
    in_flight: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def stage_memory(sizes: Sizes, stage: BuiltStage) -> StageMemory:
    """Return the memory of a rank of ``stage``."""
    per_chunk = [chunk_activations(sizes, chunk) for chunk in stage.chunks]
    bytes_per_chunk = [sum(total(kept) for _, kept in places) for places in per_chunk]
    return memory_of(sizes, stage.pp_rank, buffers_of(sizes.job, stage), bytes_per_chunk)


def memory_of(
    sizes: Sizes, pp_rank: int, buffers: Sequence[Buffer], bytes_per_chunk: Sequence[int]
) -> StageMemory:
    """Return the memory of a rank of stage ``pp_rank``.

    Args:
        sizes: the job.
        pp_rank: the stage.
        buffers: its gradient buffers.
        bytes_per_chunk: activations of one microbatch, by virtual stage.
    """
    job = sizes.job
    peak, in_flight = peak_of_schedule(job, pp_rank, bytes_per_chunk)
    return StageMemory(
        sum(buffer.numel * buffer.element_size for buffer in buffers),
        sum(buffer.numel for buffer in buffers) * GRADIENT_BYTES,
        largest_optimizer_bytes(job, buffers),
        peak,
        sum(bytes_per_chunk),
        in_flight,
    )


def chunk_activations(sizes: Sizes, chunk: BuiltChunk) -> list[tuple[str, list[Saved]]]:
    """Return ``(place, what it keeps)`` for embedding, layers and head of a chunk, in order."""
    of_family = {letter: block_activations(sizes, Family(letter)) for letter in set(chunk.letters)}
    places = [(letter, of_family[letter]) for letter in chunk.letters]
    if chunk.owns_embedding:
        places.insert(0, ("embedding", embedding_activations(sizes)))
    if chunk.owns_head:
        places.append(("head", head_activations(sizes)))
    return places


def peak_of_schedule(
    job: Job, pp_rank: int, bytes_per_chunk: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """Play Megatron's schedule on one stage.

    Args:
        job: the job; more than a few rounds of microbatches change no peak, and are not played.
        pp_rank: the stage.
        bytes_per_chunk: activations of one microbatch, by virtual stage.

    Returns:
        The most bytes held at once, and the most microbatches that each chunk holds at once.
    """
    pp, chunks = job.layout.pp, len(bytes_per_chunk)
    microbatches = min(job.num_microbatches, 4 * pp)
    order = _virtual_order(pp, chunks, microbatches)
    warm_up = min(_warm_up(pp, pp_rank, chunks), len(order))
    held, most, now, peak = [0] * chunks, [0] * chunks, 0, 0
    backward = [chunks - 1 - chunk for chunk in order]
    for step in range(len(order) + warm_up):
        if step < len(order):
            chunk = order[step]
            held[chunk] += 1
            now += bytes_per_chunk[chunk]
            most[chunk] = max(most[chunk], held[chunk])
            peak = max(peak, now)
        if step >= warm_up:
            chunk = backward[step - warm_up]
            held[chunk] -= 1
            now -= bytes_per_chunk[chunk]
    assert now == 0
    return peak, tuple(most)


def _virtual_order(pp: int, chunks: int, microbatches: int) -> list[int]:
    """The chunks that a stage runs forward, in order: ``pp`` microbatches each, in turn."""
    if chunks == 1:
        return [0] * microbatches
    return [
        chunk
        for start in range(0, microbatches, pp)
        for chunk in range(chunks)
        for _ in range(min(pp, microbatches - start))
    ]


def _warm_up(pp: int, pp_rank: int, chunks: int) -> int:
    """Forward passes before the first backward pass follows one (Megatron's ``schedules.py``)."""
    if chunks == 1:
        return pp - pp_rank - 1
    return 2 * (pp - pp_rank - 1) + (chunks - 1) * pp
