"""The legal layouts of a world, priced and ranked.

Order: layouts whose fullest rank fits the GPU come first; among them the shortest estimated step,
then the fewest bytes that leave a node in a step, then the fewest bytes sent at all, then the
emptiest GPU, and at last the layout's text, so that the order never depends on chance. Layouts that
do not fit follow, ordered by the memory of their fullest rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Literal

from nemo_megacpp.contract.candidates import Candidates, all_layouts
from nemo_megacpp.contract.costs import bubble_of
from nemo_megacpp.contract.machine import Machine
from nemo_megacpp.contract.memory import (
    GRADIENT_BYTES,
    Buffer,
    StageMemory,
    chunk_buffers,
    optimizer_bytes_per_element,
    replicas_of,
    stage_memory,
)
from nemo_megacpp.contract.pipeline_cuts import choose_cuts, work_weight
from nemo_megacpp.contract.recompute import Activations
from nemo_megacpp.contract.stages import BuiltParameter, BuiltStage, ComposedStages
from nemo_megacpp.contract.step_time import StepEstimator, StepTime
from nemo_megacpp.contract.traffic import traffic, whole_step
from nemo_megacpp.contract.work import work_of
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ModelShape, ParallelLayout
from nemo_megacpp.pattern import HybridPattern

Balance = Literal["work", "memory"]


@dataclass(frozen=True)
class Priced:
    """A legal layout and what it costs.

    Attributes:
        layout: the degrees, with the world.
        pattern: the model's pattern, cut for this pipeline.
        balance: what the cuts even out: ``work``, or ``memory`` where cuts by work do not fit.
        stages: the memory of each stage's fullest rank.
        bubble: pipeline idle time, as a share of the work.
        heaviest: work of the heaviest chunk over that of the mean chunk.
        between_nodes: bytes of one step over all ranks that leave a node; None for a layout that
            does not fit.
        sent: the same in all.
        step: the estimated time of a step; None for a layout that does not fit.
    """

    layout: ParallelLayout
    pattern: HybridPattern
    balance: Balance
    stages: tuple[StageMemory, ...]
    bubble: float
    heaviest: float
    between_nodes: int | None = None
    sent: int | None = None
    step: StepTime | None = None

    @property
    def memory(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def fullest_stage(self) -> int:
        return [stage.total for stage in self.stages].index(self.memory)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Layers of each pipeline chunk, in order of depth."""
        return tuple(map(len, self.pattern.chunks(self.layout.chunks_count)))


@dataclass(frozen=True)
class Search:
    """Which layouts there are, and the legal ones, best first.

    Attributes:
        candidates: all that were checked, and why most were rejected.
        fitting: legal layouts that fit, best first.
        too_big: legal layouts that do not, the smallest first; without their bytes sent.
        work: operations per token of each place, by which cuts are balanced.
    """

    candidates: Candidates
    fitting: tuple[Priced, ...]
    too_big: tuple[Priced, ...]
    work: dict[str, int]

    @property
    def ranked(self) -> tuple[Priced, ...]:
        """All legal layouts, best first."""
        return self.fitting + self.too_big


def search_layouts(
    job: Job,
    shape: ModelShape,
    world: int,
    machine: Machine,
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> Search:
    """Price and rank every legal layout of ``world`` ranks; ``job.hbm_bytes`` is the limit.

    Args:
        job: model, batch, precision and hardware; its layout and the cuts in its pattern are
            replaced.
        shape: of the same model; a dataclass.
        world: ranks.
        machine: on which a step is estimated, with ``job.gpus_per_node``.
        fixed: degrees, by short name, that keep their value.
    """
    assert machine.gpus_per_node == job.gpus_per_node
    search = _Searcher(job, machine)
    candidates = all_layouts(shape, world, job.gpus_per_node, search.cut_by_work, fixed)
    limit = job.hbm_bytes
    fitting, too_big = [], []
    for layout in candidates.legal:
        priced = search.price(layout)
        if limit is None or priced.memory <= limit:
            fitting.append(search.with_step(priced))
        else:
            too_big.append(priced)
    return Search(
        candidates,
        tuple(sorted(fitting, key=_rank)),
        tuple(sorted(too_big, key=lambda p: (p.memory, p.bubble, p.layout.short()))),
        search.work,
    )


def _rank(priced: Priced) -> tuple[float, int, int, int, str]:
    assert priced.between_nodes is not None and priced.sent is not None and priced.step is not None
    text = priced.layout.short()
    return priced.step.seconds, priced.between_nodes, priced.sent, priced.memory, text


class _Searcher:
    def __init__(self, job: Job, machine: Machine) -> None:
        self._uncut = dataclasses.replace(job.config().pattern, cuts=())
        self._letters = letters = self._uncut.letters
        model = {**job.model, "hybrid_pattern": str(self._uncut), "num_layers": len(letters)}
        self._job = dataclasses.replace(job, layout=ParallelLayout(), model=model)
        self._composed = ComposedStages(self._job)
        alone = self._composed.places(ParallelLayout(expert_tensor_parallel_size=1))
        whole = Sizes(self._job)
        self.work = work_of(whole, alone)
        # The last chunk has the prediction depths, wherever the others are cut.
        tail = sum(self.work[place] for place in whole.prediction)
        self._weights = {**self.work, "head": self.work["head"] + tail}
        self._estimator = StepEstimator(machine, whole, self.work)
        self._last: tuple[ParallelLayout, HybridPattern] | None = None
        self._cuts: dict[int, HybridPattern] = {}
        self._buffers: dict[tuple[object, ...], list[Buffer]] = {}

    def cut_by_work(self, chunks: int) -> HybridPattern:
        """Return the pattern with the cuts that balance the work of ``chunks`` chunks."""
        if chunks not in self._cuts:
            weight = work_weight(self._letters, chunks, self._weights)
            cuts = choose_cuts(self._letters, chunks, weight)
            assert cuts is not None  # candidates have a layer for each chunk
            self._cuts[chunks] = self._pattern(cuts)
        return self._cuts[chunks]

    def price(self, layout: ParallelLayout) -> Priced:
        """Price the memory of ``layout``, with cuts by memory if those by work do not fit."""
        pattern = self.cut_by_work(layout.chunks_count)
        priced = self._priced(layout, pattern, "work")
        limit = self._job.hbm_bytes
        if limit is None or priced.memory <= limit or layout.pp == 1 or layout.vpp:
            return priced
        weight = self._memory_weight(self._sizes(layout, pattern))
        cuts = choose_cuts(self._letters, layout.pp, weight, limit)
        if cuts is None:
            return priced
        other = self._priced(layout, self._pattern(cuts), "memory")
        return min(priced, other, key=lambda p: p.memory)

    def with_step(self, priced: Priced) -> Priced:
        """Add what ``priced`` sends in a step, and how long the step takes."""
        layout, gpus = priced.layout, self._job.gpus_per_node
        sizes = self._sizes(layout, priced.pattern)
        ranks = layout.world // layout.pp
        stages = self._stages(layout, priced.pattern)
        buffers = [self._stage_buffers(sizes.job, stage) for stage in stages]
        # A stage's groups lie on nodes as those of another do that begins as far into a node.
        alike: dict[int, list[int]] = {}
        for stage in stages:
            alike.setdefault(stage.pp_rank * ranks % gpus, []).append(stage.pp_rank)
        between = sent = 0
        for mine in alike.values():
            made = whole_step(sizes, [stages[i] for i in mine], [buffers[i] for i in mine])
            for item in traffic(layout, made, mine[0] * ranks, gpus):
                between += item.between_nodes * ranks
                sent += item.sent_bytes * ranks
        places = self._composed.places(layout)
        step = self._estimator.estimate(sizes, places, stages, priced.stages, buffers)
        return dataclasses.replace(priced, between_nodes=between, sent=sent, step=step)

    def _pattern(self, cuts: tuple[int, ...]) -> HybridPattern:
        return dataclasses.replace(self._uncut, cuts=cuts)

    def _sizes(self, layout: ParallelLayout, pattern: HybridPattern) -> Sizes:
        """A configuration takes long to build: the last one is kept."""
        if (layout, pattern) != self._last:
            model = {**self._job.model, "hybrid_pattern": str(pattern)}
            self._last_sizes = Sizes(dataclasses.replace(self._job, layout=layout, model=model))
            self._last = (layout, pattern)
        return self._last_sizes

    def _stages(self, layout: ParallelLayout, pattern: HybridPattern) -> list[BuiltStage]:
        chunks = pattern.chunks(layout.chunks_count)
        return [self._composed.stage(layout, pp_rank, chunks) for pp_rank in range(layout.pp)]

    def _priced(self, layout: ParallelLayout, pattern: HybridPattern, balance: Balance) -> Priced:
        sizes = self._sizes(layout, pattern)
        saved, chunks = Activations(sizes), layout.chunks_count
        weight = work_weight(self._letters, chunks, self._weights)
        weights = [
            weight(index, layers.start, layers.stop)
            for index, layers in enumerate(pattern.chunks(chunks))
        ]
        return Priced(
            layout,
            pattern,
            balance,
            tuple(
                stage_memory(sizes, stage, self._stage_buffers(sizes.job, stage), saved)
                for stage in self._stages(layout, pattern)
            ),
            bubble_of(sizes),
            max(weights) * chunks / sum(weights),
        )

    def _stage_buffers(self, job: Job, stage: BuiltStage) -> list[Buffer]:
        """Dense buffers do not depend on EP and ETP, nor expert ones on TP: each is laid out once
        for all layouts that share it."""
        layout, found = job.layout, []
        dense, expert = (layout.tp, layout.sp, layout.pp > 1), (layout.ep, layout.etp)
        for chunk in stage.chunks:
            for is_expert, split in ((False, dense), (True, expert)):
                place = (chunk.index, layout.chunks_count, chunk.layers)
                key = (is_expert, *split, replicas_of(job, is_expert), *place)
                if key not in self._buffers:
                    self._buffers[key] = chunk_buffers(job, chunk, is_expert)
                found += self._buffers[key]
        return found

    def _memory_weight(self, sizes: Sizes) -> Callable[[int, int, int], int]:
        """Return the bytes of a stage that holds given layers, without padding."""
        job, layout, saved = sizes.job, sizes.layout, Activations(sizes)
        static = {
            place: sum(p.numel * _bytes_per_element(job, p) for p in parameters)
            for place, parameters in self._composed.places(layout).items()
        }
        static_before = [0, *accumulate(static[letter] for letter in self._letters)]

        def weight(stage: int, first: int, end: int) -> int:
            ends = ["embedding"] * (stage == 0)
            if stage == layout.pp - 1:
                ends += [*sizes.prediction, "head"]
            held = static_before[end] - static_before[first] + sum(static[e] for e in ends)
            if sizes.prediction and stage == layout.pp - 1 and stage:
                held += static["embedding"]  # its copy
            kept, regained = saved.at_most(self._letters, first, end)
            kept += sum(saved.kept[e] for e in ends)
            return held + kept * min(layout.pp - stage, job.num_microbatches) + regained

        return weight


def _bytes_per_element(job: Job, parameter: BuiltParameter) -> int:
    optimizer = optimizer_bytes_per_element(parameter.element_size)
    if job.use_distributed_optimizer:
        optimizer = -(-optimizer // replicas_of(job, parameter.is_expert))
    return parameter.element_size + GRADIENT_BYTES + optimizer
