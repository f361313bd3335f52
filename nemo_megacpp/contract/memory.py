"""The memory of each pipeline stage: exact bytes of what is allocated, formulas for activations.

Parameters, gradients and the optimizer are exact. ``_ParamAndGradBuffer``
(``megatron/core/distributed/param_and_grad_buffer.py``) lays a chunk's parameters out in reverse
order: dense and expert ones apart, and apart by dtype, as a few of a bf16 model are float32. The
distributed optimizer pads them and gives each data-parallel rank an equal share of every bucket,
wherever parameters end. Activations are formulas, times the microbatches in flight of Megatron's
schedule, and what recompute regains in one backward pass (:mod:`nemo_megacpp.contract.recompute`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from nemo_megacpp.contract.recompute import Activations
from nemo_megacpp.contract.stages import BuiltChunk, BuiltParameter, BuiltStage
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.side_channels import channel_places

GRADIENT_BYTES = 4
"""A gradient is accumulated and reduced in float32, in either precision."""

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_BUCKET_ELEMENTS = 40_000_000
_BUCKET_ELEMENTS_PER_REPLICA = 1_000_000


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the rank of a stage that holds most.

    Attributes:
        parameters, gradients: as allocated, with the distributed optimizer's padding.
        optimizer: float32 parameters and Adam's state, on the rank that owns most.
        activations: the peak over the schedule, by formula.
        activations_per_microbatch: what all the stage's chunks keep of one, by formula.
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
        """Bytes in all."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def stage_memory(
    sizes: Sizes, stage: BuiltStage, buffers: Sequence[Buffer], saved: Activations
) -> StageMemory:
    """Return the memory of a rank of ``stage``.

    Args:
        sizes: the job.
        stage: the stage.
        buffers: its gradient buffers.
        saved: activations of one microbatch.
    """
    chunks = [
        saved.chunk(
            chunk.places,
            [
                *channel_places(sizes.config.side_channels, chunk.owners),
                *[""] * (len(chunk.prediction) + chunk.owns_head),
            ],
        )
        for chunk in stage.chunks
    ]
    per_chunk = [chunk.kept for chunk in chunks]
    regained = [chunk.peak - chunk.kept for chunk in chunks]
    peak, in_flight = peak_of_schedule(sizes.job, stage.pp_rank, per_chunk, regained)
    return StageMemory(
        sum(buffer.numel * buffer.element_size for buffer in buffers),
        sum(buffer.numel for buffer in buffers) * GRADIENT_BYTES,
        largest_optimizer_bytes(sizes.job, buffers),
        peak,
        sum(per_chunk),
        in_flight,
    )


@dataclass(frozen=True)
class Bucket:
    """A part of a buffer that is reduced as one.

    Attributes:
        numel: elements, with padding.
        ranges: first and last-plus-one element of each parameter.
    """

    numel: int
    ranges: tuple[tuple[int, int], ...]

    def owned(self, replicas: int, rank: int) -> tuple[int, int]:
        """Return the parameter elements in the share of replica ``rank``, and how many parameters
        have some there."""
        share = self.numel // replicas
        start, stop = rank * share, (rank + 1) * share
        begins, ends, before = self._edges
        first, last = bisect_right(ends, start), bisect_left(begins, stop)
        if first >= last:
            return 0, 0
        cut_off = max(0, start - begins[first]) + max(0, ends[last - 1] - stop)
        return before[last] - before[first] - cut_off, last - first

    @cached_property
    def _edges(self) -> tuple[list[int], list[int], list[int]]:
        """Where parameters begin and end, and the elements of all before each; sorted, so that
        the share of one of many replicas is found by bisection."""
        begins, ends = map(list, zip(*self.ranges, strict=True))
        before = [0, *accumulate(end - begin for begin, end in self.ranges)]
        return begins, ends, before


@dataclass(frozen=True)
class Buffer:
    """The gradients of a chunk's dense or expert parameters.

    Attributes:
        chunk: index of the chunk.
        is_expert: reduced over ``edp`` instead of ``dp-cp``.
        element_size: bytes of a parameter's element.
        buckets: padded with the distributed optimizer; several in the first chunk with
            ``overlap_grad_reduce``.
    """

    chunk: int
    is_expert: bool
    element_size: int
    buckets: tuple[Bucket, ...]

    @property
    def group(self) -> str:
        """The group over which it is reduced."""
        return "edp" if self.is_expert else "dp-cp"

    @property
    def numel(self) -> int:
        """Elements, with padding."""
        return sum(bucket.numel for bucket in self.buckets)


def stage_buffers(job: Job, stage: BuiltStage) -> list[Buffer]:
    """Return the gradient buffers of a rank of ``stage``: of each chunk the dense ones first."""
    return [
        buffer
        for chunk in stage.chunks
        for is_expert in (False, True)
        for buffer in chunk_buffers(job, chunk, is_expert)
    ]


def chunk_buffers(job: Job, chunk: BuiltChunk, is_expert: bool) -> list[Buffer]:
    """Return the buffers of a chunk's dense or expert parameters: one for each dtype."""
    by_size: dict[int, list[BuiltParameter]] = {}
    for parameter in reversed(chunk.parameters):
        if parameter.is_expert == is_expert:
            by_size.setdefault(parameter.element_size, []).append(parameter)
    return [
        Buffer(
            chunk.index,
            is_expert,
            element_size,
            tuple(_buckets(job, is_expert, parameters, divided=chunk.index == 0)),
        )
        for element_size, parameters in by_size.items()
    ]


def _buckets(
    job: Job, is_expert: bool, parameters: Iterable[BuiltParameter], divided: bool
) -> Iterator[Bucket]:
    """Yield the buckets of a buffer. ``divided``: Megatron divides only those of the first chunk,
    and only to reduce them during the backward pass."""
    align, unit, most = 1, 1, math.inf
    if job.use_distributed_optimizer:
        align = _PARAMETER_ALIGNMENT
        unit = math.lcm(replicas_of(job, is_expert), _BUCKET_ALIGNMENT)
    if divided and job.overlap_grad_reduce:
        most = max(_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_PER_REPLICA * job.layout.data_parallel_size)
    end = 0
    ranges: list[tuple[int, int]] = []
    for parameter in parameters:
        # The distributed optimizer puts a tied embedding into a bucket of its own.
        alone = job.use_distributed_optimizer and parameter.shared_embedding
        if alone and ranges:
            yield Bucket(_round_up(end, unit), tuple(ranges))
            end, ranges = 0, []
        start = _round_up(end, align)
        end = start + parameter.numel
        ranges.append((start, end))
        if alone or end >= most:
            yield Bucket(_round_up(end, unit), tuple(ranges))
            end, ranges = 0, []
    if ranges:
        yield Bucket(_round_up(end, unit), tuple(ranges))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def replicas_of(job: Job, is_expert: bool) -> int:
    """Return how many ranks share a buffer's reduction."""
    if is_expert:
        return job.layout.expert_data_parallel_size
    return job.layout.data_parallel_size * job.layout.cp


def optimizer_bytes_per_element(element_size: int) -> int:
    """Return the bytes of Adam's two moments, and of the float32 copy that a parameter of fewer
    than four bytes an element has."""
    return 8 if element_size == GRADIENT_BYTES else 12


def optimizer_bytes(job: Job, buffers: Sequence[Buffer], dense: int, expert: int) -> int:
    """Return the bytes of a rank's optimizer: its copy of the parameters, and Adam's state.

    ``dense`` and ``expert`` are the rank's places in its ``dp-cp`` and ``edp`` groups.
    """
    # torch's Adam counts the steps of every parameter in a tensor; fused ones count once.
    per_parameter = 4 if job.kernels == "torch" else 0
    found = 0
    for buffer in buffers:
        replicas, rank = replicas_of(job, buffer.is_expert), expert if buffer.is_expert else dense
        if not job.use_distributed_optimizer:
            replicas, rank = 1, 0
        for bucket in buffer.buckets:
            elements, parameters = bucket.owned(replicas, rank)
            found += elements * optimizer_bytes_per_element(buffer.element_size)
            found += parameters * per_parameter
    return found


def largest_optimizer_bytes(job: Job, buffers: Sequence[Buffer]) -> int:
    """Return `optimizer_bytes` of the rank that owns most."""
    if not job.use_distributed_optimizer:
        return optimizer_bytes(job, buffers, 0, 0)
    totals = []
    for is_expert in (False, True):
        mine = [buffer for buffer in buffers if buffer.is_expert == is_expert]
        places = range(replicas_of(job, is_expert)) if mine else range(1)
        totals.append(max(optimizer_bytes(job, mine, place, place) for place in places))
    return sum(totals)


def peak_of_schedule(
    job: Job, pp_rank: int, bytes_per_chunk: Sequence[int], regained: Sequence[int] = ()
) -> tuple[int, tuple[int, ...]]:
    """Play Megatron's schedule on one stage.

    Args:
        job: the job; more than a few rounds of microbatches change no peak, and are not played.
        pp_rank: the stage.
        bytes_per_chunk: activations of one microbatch, by virtual stage.
        regained: what a chunk holds beyond them in its backward pass, where it recomputes.

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
            peak = max(peak, now + (regained[chunk] if regained else 0))
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
