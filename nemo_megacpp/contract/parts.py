"""The stages of any pipeline, put together from one real layer of each family.

A parameter's shape on a rank depends on its family and on TP, SP, EP and ETP alone. One small model
with one layer of each family is built for each of these, and the stages of every pipeline are
lists of its layers: exact, and cheap enough to price thousands of layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemo_megacpp.contract.build import BuiltChunk, BuiltParameter, BuiltStage, build_stages
from nemo_megacpp.formulas.job import Job
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import CUT, Family

Parameters = tuple[BuiltParameter, ...]
_Key = tuple[Any, ...]


class Parts:
    """Layers of a job's model in any layout, each built once.

    The parameters of a composed chunk keep the names and layer numbers of the small model.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._letters = job.config().pattern.letters
        self._dense: dict[_Key, dict[str, Parameters]] = {}
        self._expert: dict[_Key, Parameters] = {}
        self._chunks: dict[_Key, BuiltChunk] = {}

    @property
    def letters(self) -> str:
        """The families of the whole model."""
        return self._letters

    @property
    def has_experts(self) -> bool:
        return Family.EXPERT.value in self._letters

    def dense(self, layout: ParallelLayout) -> dict[str, Parameters]:
        """Return all parameters but the experts', by letter and for ``embedding`` and ``head``."""
        key = (layout.tp, layout.sp, layout.pp > 1)
        if key not in self._dense:
            self._dense[key] = self._build_dense(layout)
        return self._dense[key]

    def experts(self, layout: ParallelLayout) -> Parameters:
        """Return the parameters of one E block's experts on a rank."""
        key = (layout.ep, layout.etp)
        if key not in self._expert:
            small = ParallelLayout(
                expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp
            )
            (stage,) = self._build(small, Family.EXPERT.value)
            self._expert[key] = tuple(p for p in stage.parameters if p.is_expert)
        return self._expert[key]

    def places(self, layout: ParallelLayout) -> dict[str, Parameters]:
        """Return the parameters of one layer of each family, of ``embedding`` and of ``head``."""
        places = dict(self.dense(layout))
        if self.has_experts:
            places[Family.EXPERT.value] += self.experts(layout)
        return places

    def stage(self, layout: ParallelLayout, pp_rank: int, chunks: Sequence[range]) -> BuiltStage:
        """Return stage ``pp_rank`` of the pipeline whose chunks hold the given layers."""
        mine = [layout.chunk_index(pp_rank, virtual) for virtual in range(layout.vpp or 1)]
        return BuiltStage(pp_rank, tuple(self._chunk(layout, index, chunks) for index in mine))

    def _chunk(self, layout: ParallelLayout, index: int, chunks: Sequence[range]) -> BuiltChunk:
        layers, is_last = chunks[index], index == len(chunks) - 1
        key = (layout.tp, layout.sp, layout.ep, layout.etp, index, len(chunks), layers)
        if key not in self._chunks:
            places, letters = self.places(layout), self._letters[layers.start : layers.stop]
            inside = [p for letter in letters for p in places[letter]]
            embedding = places["embedding"] if index == 0 else ()
            head = places["head"] if is_last else ()
            parameters = (*embedding, *inside, *head)
            self._chunks[key] = BuiltChunk(index, layers, letters, index == 0, is_last, parameters)
        return self._chunks[key]

    def _build_dense(self, layout: ParallelLayout) -> dict[str, Parameters]:
        letters = "".join(dict.fromkeys(self._letters))
        # Two stages wherever there are several: a head that is tied to the embedding then has a
        # copy of its own.
        pattern = letters + CUT + letters[0] if layout.pp > 1 else letters
        small = ParallelLayout(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            pipeline_model_parallel_size=2 if layout.pp > 1 else 1,
            expert_tensor_parallel_size=1,
        )
        stages = self._build(small, pattern)
        first, last = stages[0].chunks[0], stages[-1].chunks[-1]
        places = {
            letter: tuple(p for p in first.parameters if p.layer == layer and not p.is_expert)
            for layer, letter in enumerate(letters)
        }
        for name, chunk in (("embedding", first), ("head", last)):
            places[name] = tuple(
                p
                for p in chunk.parameters
                if p.layer is None and p.name.startswith("embedding.") == (name == "embedding")
            )
        return places

    def _build(self, layout: ParallelLayout, pattern: str) -> list[BuiltStage]:
        depth = len(pattern.replace(CUT, ""))
        model = {**self._job.model, "hybrid_pattern": pattern, "num_layers": depth}
        return build_stages(dataclasses.replace(self._job, model=model, layout=layout))
