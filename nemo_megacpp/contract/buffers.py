"""Megatron's gradient buffers, and what of them a rank's optimizer owns: exact bytes.

``_ParamAndGradBuffer`` (``megatron/core/distributed/param_and_grad_buffer.py``) lays a chunk's
parameters out in reverse order: dense and expert ones apart, and apart by dtype, as a few of a bf16
model are float32. The distributed optimizer pads them and gives each data-parallel rank an equal
share of every bucket, wherever parameters end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from nemo_megacpp.contract.build import BuiltChunk, BuiltParameter, BuiltStage
from nemo_megacpp.formulas.job import Job

GRADIENT_BYTES = 4
"""A gradient is accumulated and reduced in float32, in either precision."""

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


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
        the share of one of many replicas is found without reading all of them."""
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
        buckets: without the distributed optimizer one, without padding.
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


def buffers_of(job: Job, stage: BuiltStage) -> list[Buffer]:
    """Return the gradient buffers of a rank of ``stage``."""
    return [
        _buffer(job, chunk.index, is_expert, element_size, parameters)
        for chunk in stage.chunks
        for (is_expert, element_size), parameters in _by_buffer(chunk)
    ]


def _by_buffer(chunk: BuiltChunk) -> list[tuple[tuple[bool, int], list[BuiltParameter]]]:
    """Return the parameters of each buffer of ``chunk``, dense ones first."""
    found: dict[tuple[bool, int], list[BuiltParameter]] = {}
    for parameter in reversed(chunk.parameters):
        found.setdefault((parameter.is_expert, parameter.element_size), []).append(parameter)
    return sorted(found.items(), key=lambda item: item[0][0])


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
    """Return the bytes of the optimizer on one rank: its copy of the parameters, and Adam's state.

    Args:
        job: the job.
        buffers: of the rank's stage.
        dense, expert: the rank's place in its ``dp-cp`` and ``edp`` groups.
    """
    # torch's Adam counts the steps of every parameter in a tensor; fused ones count once.
    per_parameter = 4 if job.kernels == "torch" else 0
    total = 0
    for buffer in buffers:
        replicas, rank = replicas_of(job, buffer.is_expert), expert if buffer.is_expert else dense
        per_element = optimizer_bytes_per_element(buffer.element_size)
        for bucket in buffer.buckets:
            if job.use_distributed_optimizer:
                elements, parameters = bucket.owned(replicas, rank)
            else:
                elements = sum(end - begin for begin, end in bucket.ranges)
                parameters = len(bucket.ranges)
            total += elements * per_element + parameters * per_parameter
    return total


def largest_optimizer_bytes(job: Job, buffers: Sequence[Buffer]) -> int:
    """Return the bytes on the rank that owns most."""
    if not job.use_distributed_optimizer:
        return optimizer_bytes(job, buffers, 0, 0)
    totals = []
    for is_expert in (False, True):
        mine = [buffer for buffer in buffers if buffer.is_expert == is_expert]
        places = range(replicas_of(job, is_expert)) if mine else range(1)
        totals.append(max(optimizer_bytes(job, mine, place, place) for place in places))
    return sum(totals)


def _buffer(
    job: Job, chunk: int, is_expert: bool, element_size: int, parameters: list[BuiltParameter]
) -> Buffer:
    unit = math.lcm(replicas_of(job, is_expert), _BUCKET_ALIGNMENT)
    padded = job.use_distributed_optimizer
    buckets: list[Bucket] = []
    ranges: list[tuple[int, int]] = []

    def close() -> None:
        if ranges:
            end = ranges[-1][1]
            buckets.append(Bucket(_round_up(end, unit) if padded else end, tuple(ranges)))
            ranges.clear()

    for parameter in parameters:
        alone = padded and parameter.shared_embedding
        if alone:
            close()
        start = ranges[-1][1] if ranges else 0
        start = _round_up(start, _PARAMETER_ALIGNMENT) if padded else start
        ranges.append((start, start + parameter.numel))
        if alone:
            close()
    close()
    return Buffer(chunk, is_expert, element_size, tuple(buckets))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def summed_over_tp(job: Job, parameters: Sequence[BuiltParameter]) -> int:
    """Return the elements whose gradients Megatron sums over tp once per step, in one message."""
    if not job.layout.sp:
        return 0
    return sum(p.numel for p in parameters if p.sequence_parallel)
