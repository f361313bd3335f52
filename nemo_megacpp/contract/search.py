"""The legal layouts of a world, priced and ranked.

Order: layouts whose fullest rank fits the GPU come first; among them the fewest bytes that leave a
node in a step, then the fewest bytes sent at all, then the smallest pipeline bubble, then the
emptiest GPU, and at last the layout's text, so that the order never depends on chance. Layouts that
do not fit come by the memory of their fullest rank.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from nemo_megacpp.contract.activations import (
    block_activations,
    embedding_activations,
    head_activations,
)
from nemo_megacpp.contract.buffers import (
    GRADIENT_BYTES,
    Buffer,
    buffers_of,
    optimizer_bytes_per_element,
    replicas_of,
)
from nemo_megacpp.contract.build import BuiltParameter, BuiltStage
from nemo_megacpp.contract.candidates import Candidates, all_layouts
from nemo_megacpp.contract.communication import (
    block_collectives,
    embedding_collectives,
    head_collectives,
)
from nemo_megacpp.contract.cuts import choose_cuts, work_weight
from nemo_megacpp.contract.memory import StageMemory, memory_of
from nemo_megacpp.contract.parts import Parts
from nemo_megacpp.contract.step import pipeline_messages, step_collectives
from nemo_megacpp.contract.traffic import traffic
from nemo_megacpp.contract.work import Work, work_of
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.job import Job
from nemo_megacpp.formulas.saved import total
from nemo_megacpp.formulas.sizes import Sizes, sizes_of_job
from nemo_megacpp.layout import ModelShape, ParallelLayout
from nemo_megacpp.pattern import Family, HybridPattern

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
        between_nodes, sent: bytes of one step over all ranks: that leave a node, and in all; None
            where they were not asked for.
    """

    layout: ParallelLayout
    pattern: HybridPattern
    balance: Balance
    stages: tuple[StageMemory, ...]
    bubble: float
    heaviest: float
    between_nodes: int | None = None
    sent: int | None = None

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
    """The answer: which layouts there are, and the legal ones, best first.

    Attributes:
        candidates: all that were looked at, and why most were rejected.
        fitting: legal layouts that fit, best first.
        too_big: legal layouts that do not, the smallest first; without their bytes sent.
        work: of each part of the model, by which cuts are balanced.
    """

    candidates: Candidates
    fitting: tuple[Priced, ...]
    too_big: tuple[Priced, ...]
    work: Work

    @property
    def ranked(self) -> tuple[Priced, ...]:
        """All legal layouts, best first."""
        return self.fitting + self.too_big


def search_layouts(
    job: Job,
    shape: ModelShape,
    world: int,
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> Search:
    """Price and rank every legal layout of ``world`` ranks; ``job.hbm_bytes`` is the limit.

    Args:
        job: model, batch, precision and hardware; its layout, and the cuts in its pattern, are
            what is searched for.
        shape: of the same model; a dataclass.
        world: ranks.
        fixed: degrees, by short name, that are not searched for.
    """
    search = _Searcher(job)
    candidates = all_layouts(shape, world, job.gpus_per_node, search.cut_by_work, fixed)
    priced = [search.price(layout) for layout in candidates.legal]
    limit = job.hbm_bytes
    fitting = [search.with_traffic(p) for p in priced if limit is None or p.memory <= limit]
    too_big = [p for p in priced if limit is not None and p.memory > limit]
    return Search(
        candidates,
        tuple(sorted(fitting, key=_rank)),
        tuple(sorted(too_big, key=lambda p: (p.memory, p.bubble, p.layout.short()))),
        search.work,
    )


def _rank(priced: Priced) -> tuple[int, int, float, int, str]:
    assert priced.between_nodes is not None and priced.sent is not None
    text = priced.layout.short()
    return priced.between_nodes, priced.sent, priced.bubble, priced.memory, text


class _Searcher:
    def __init__(self, job: Job) -> None:
        self._job = dataclasses.replace(job, layout=ParallelLayout(), model=_without_cuts(job))
        self._parts = Parts(self._job)
        alone = self._parts.places(ParallelLayout(expert_tensor_parallel_size=1))
        self.work = work_of(sizes_of_job(self._job), alone)
        self._cuts: dict[int, HybridPattern] = {}
        self._buffers: dict[tuple[object, ...], list[Buffer]] = {}

    def cut_by_work(self, chunks: int) -> HybridPattern:
        """Return the pattern with the cuts that balance the work of ``chunks`` chunks."""
        if chunks not in self._cuts:
            letters = self._parts.letters
            cuts = choose_cuts(letters, chunks, work_weight(letters, chunks, self.work))
            assert cuts is not None  # candidates have a layer for each chunk
            self._cuts[chunks] = _pattern(letters, cuts)
        return self._cuts[chunks]

    def price(self, layout: ParallelLayout) -> Priced:
        """Price the memory of ``layout``, with cuts by memory if those by work do not fit."""
        pattern = self.cut_by_work(layout.chunks_count)
        sizes = self._sizes(layout, pattern)
        priced = self._priced(sizes, pattern, "work")
        limit = self._job.hbm_bytes
        if limit is None or priced.memory <= limit or layout.pp == 1 or layout.vpp:
            return priced
        cuts = choose_cuts(self._parts.letters, layout.pp, self._memory_weight(sizes), limit)
        if cuts is None:
            return priced
        pattern = _pattern(self._parts.letters, cuts)
        other = self._priced(self._sizes(layout, pattern), pattern, "memory")
        return min(priced, other, key=lambda p: p.memory)

    def with_traffic(self, priced: Priced) -> Priced:
        """Add what ``priced`` sends in a step."""
        sizes = self._sizes(priced.layout, priced.pattern)
        layout, gpus = priced.layout, self._job.gpus_per_node
        ranks = layout.world // layout.pp
        # A stage's groups lie on nodes as those of another do that begins as far into a node.
        like: dict[int, list[BuiltStage]] = {}
        for stage in self._stages(layout, priced.pattern):
            like.setdefault(stage.pp_rank * ranks % gpus, []).append(stage)
        between = sent = 0
        for stages in like.values():
            made = self._collectives(sizes, stages)
            totals = traffic(layout, made, stages[0].pp_rank * ranks, gpus)
            between += sum(item.between_nodes for item in totals) * ranks
            sent += sum(item.sent_bytes for item in totals) * ranks
        return dataclasses.replace(priced, between_nodes=between, sent=sent)

    def _sizes(self, layout: ParallelLayout, pattern: HybridPattern) -> Sizes:
        model = {**self._job.model, "hybrid_pattern": str(pattern)}
        return sizes_of_job(dataclasses.replace(self._job, layout=layout, model=model))

    def _stages(self, layout: ParallelLayout, pattern: HybridPattern) -> list[BuiltStage]:
        chunks = pattern.chunks(layout.chunks_count)
        return [self._parts.stage(layout, pp_rank, chunks) for pp_rank in range(layout.pp)]

    def _priced(self, sizes: Sizes, pattern: HybridPattern, balance: Balance) -> Priced:
        layout, chunks = sizes.layout, sizes.layout.chunks_count
        kept = self._kept(sizes)
        stages = tuple(
            memory_of(
                sizes,
                stage.pp_rank,
                self._buffers_of(sizes.job, stage, chunks),
                [
                    sum(kept[letter] for letter in chunk.letters)
                    + chunk.owns_embedding * kept["embedding"]
                    + chunk.owns_head * kept["head"]
                    for chunk in stage.chunks
                ],
            )
            for stage in self._stages(layout, pattern)
        )
        weight = work_weight(self._parts.letters, chunks, self.work)
        weights = [
            weight(index, layers.start, layers.stop)
            for index, layers in enumerate(pattern.chunks(chunks))
        ]
        return Priced(
            layout,
            pattern,
            balance,
            stages,
            (layout.pp - 1) / ((layout.vpp or 1) * sizes.job.num_microbatches),
            max(weights) * chunks / sum(weights),
        )

    def _kept(self, sizes: Sizes) -> dict[str, int]:
        """Activations of one microbatch, by place."""
        families = dict.fromkeys(self._parts.letters)
        return {
            **{letter: total(block_activations(sizes, Family(letter))) for letter in families},
            "embedding": total(embedding_activations(sizes)),
            "head": total(head_activations(sizes)),
        }

    def _buffers_of(self, job: Job, stage: BuiltStage, chunks: int) -> list[Buffer]:
        """Dense buffers do not depend on EP and ETP, nor expert ones on TP: each is laid out once
        for all layouts that share it."""
        found = []
        for chunk in stage.chunks:
            for is_expert in (False, True):
                split = (
                    (job.layout.ep, job.layout.etp)
                    if is_expert
                    else (job.layout.tp, job.layout.sp, job.layout.pp > 1)
                )
                replicas = replicas_of(job, is_expert)
                key = (is_expert, *split, replicas, chunk.index, chunks, chunk.layers)
                if key not in self._buffers:
                    some = tuple(p for p in chunk.parameters if p.is_expert == is_expert)
                    part = dataclasses.replace(chunk, parameters=some)
                    self._buffers[key] = buffers_of(job, BuiltStage(stage.pp_rank, (part,)))
                found += self._buffers[key]
        return found

    def _collectives(self, sizes: Sizes, stages: Sequence[BuiltStage]) -> list[Collective]:
        """Everything that one rank of each of ``stages`` sends in a step."""
        chunks = sizes.layout.chunks_count
        places: Counter[str] = Counter()
        once: list[Collective] = []
        for stage in stages:
            for chunk in stage.chunks:
                places.update(chunk.letters)
                places["embedding"] += chunk.owns_embedding
                places["head"] += chunk.owns_head
            buffers = self._buffers_of(sizes.job, stage, chunks)
            once += step_collectives(sizes, stage, self._parts.has_experts, buffers)
        made = [(item, count) for place, count in places.items() for item in _sent(sizes, place)]
        if sizes.layout.pp > 1:
            made += [(item, 1) for stage in stages for item in pipeline_messages(sizes, stage)]
        microbatches = sizes.job.num_microbatches
        repeated = [
            dataclasses.replace(item, count=item.count * count * microbatches)
            for item, count in made
            if count
        ]
        return repeated + once

    def _memory_weight(self, sizes: Sizes) -> Callable[[int, int, int], int]:
        """Return the bytes of a stage that holds given layers, without padding."""
        job, layout, letters = sizes.job, sizes.layout, self._parts.letters
        places, kept = self._parts.places(layout), self._kept(sizes)

        @cache
        def static(place: str) -> int:
            return sum(p.numel * _bytes_per_element(job, p) for p in places[place])

        fixed, moving = [0], [0]
        for letter in letters:
            fixed.append(fixed[-1] + static(letter))
            moving.append(moving[-1] + kept[letter])

        def weight(stage: int, first: int, end: int) -> int:
            held, waiting = fixed[end] - fixed[first], moving[end] - moving[first]
            if stage == 0:
                held, waiting = held + static("embedding"), waiting + kept["embedding"]
            if stage == layout.pp - 1:
                held, waiting = held + static("head"), waiting + kept["head"]
            return held + waiting * min(layout.pp - stage, job.num_microbatches)

        return weight


def _sent(sizes: Sizes, place: str) -> list[Collective]:
    if place == "embedding":
        return embedding_collectives(sizes)
    return head_collectives(sizes) if place == "head" else block_collectives(sizes, Family(place))


def _bytes_per_element(job: Job, parameter: BuiltParameter) -> int:
    optimizer = optimizer_bytes_per_element(parameter.element_size)
    if job.use_distributed_optimizer:
        optimizer = -(-optimizer // replicas_of(job, parameter.is_expert))
    return parameter.element_size + GRADIENT_BYTES + optimizer


def _without_cuts(job: Job) -> dict[str, Any]:
    letters = job.config().pattern.letters
    return {**job.model, "hybrid_pattern": letters, "num_layers": len(letters)}


def _pattern(letters: str, cuts: tuple[int, ...]) -> HybridPattern:
    return HybridPattern(tuple(map(Family, letters)), cuts)
