"""What each pipeline stage holds: its chunks and their parameters, built without memory.

:func:`build_stages` builds the real modules on the meta device and reads off their parameters.
Ranks that differ only in their place on tp, cp, ep, etp or dp hold tensors of the same shapes: the
layout rules let nothing be divided unevenly. One rank per pipeline stage is therefore built, in the
smallest world that holds the layout; how many replicas there are changes no shape. The modules are
those of the torch backend, whose parameters are Transformer Engine's, name for name.

:class:`ComposedStages` puts the stages of any layout together from one real layer of each family:
a parameter's shape on a rank depends on its family and on TP, SP, EP and ETP alone. That is exact,
and cheap enough to price thousands of layouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from nemo_megacpp.checkpoint.dcp import sharding_metadata
from nemo_megacpp.formulas.sizes import PREDICTION, Job
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import CUT, MTP, Family
from nemo_megacpp.runtime.distributed import fake_rank
from nemo_megacpp.settings.combinations import with_modules_of
from nemo_megacpp.side_channels import channels_at, read_side_channels
from nemo_megacpp.specs.backend import TorchBackend
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks


@dataclass(frozen=True)
class BuiltParameter:
    """A parameter as one rank's module holds it.

    Attributes:
        name: within the chunk.
        layer: global number of the layer, from 0, whose it is or whose side channel, those of
            prediction depths after the decoder's; None outside the layers.
        local_shape: what the rank holds; with a leading axis of experts for an expert's weight.
        global_shape: of the whole parameter, as a checkpoint knows it.
        is_expert: reduced over the expert-data-parallel group.
        sequence_parallel: Megatron sums its gradient over tp once per step.
        sums_over_tp: every tp rank uses the whole of it for its own heads, so that its gradient is
            partial on tp (:mod:`nemo_megacpp.mixers.replicated`).
        shared_embedding: the embedding of a model whose head is tied to it.
        element_size: bytes of an element; in bf16 a few parameters stay float32.
    """

    name: str
    layer: int | None
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    is_expert: bool
    sequence_parallel: bool
    sums_over_tp: bool
    shared_embedding: bool
    element_size: int

    @property
    def numel(self) -> int:
        """Elements on this rank."""
        return math.prod(self.local_shape)

    @property
    def end(self) -> str:
        """The place of a parameter outside the layers."""
        owner = self.name.split(".")[0]
        return {"embedding": "embedding", "mtp": PREDICTION}.get(owner, "head")

    @property
    def is_side_channel(self) -> bool:
        """Whether it belongs to side channels, not to the layer's family or to the embedding."""
        return "side_channels" in self.name.split(".")


@dataclass(frozen=True)
class BuiltChunk:
    """One pipeline chunk.

    Its *places* are the families' letters, ``embedding``, ``head`` and ``prediction``.

    Attributes:
        index: in the order of depth.
        layers: global numbers of its layers.
        letters: their families.
        owns_embedding, owns_head: whether it has the embedding; the final norm, head and loss.
        parameters: in the module's order, which is that of the gradient buffers, reversed. A chunk
            with prediction depths that has not the embedding has a copy of it.
        depth_letters: families of a prediction depth.
        depths: how many of them it has.
        depths_from: global number of the first layer of the first.
    """

    index: int
    layers: range
    letters: str
    owns_embedding: bool
    owns_head: bool
    parameters: tuple[BuiltParameter, ...]
    depth_letters: str = ""
    depths: int = 0
    depths_from: int = 0

    @property
    def prediction(self) -> list[str]:
        """The places of its prediction depths."""
        return [PREDICTION, *self.depth_letters] * self.depths

    @property
    def places(self) -> list[str]:
        """What the chunk computes, in order: one place for each layer and for each end."""
        first, last = ["embedding"] * self.owns_embedding, ["head"] * self.owns_head
        return [*first, *self.letters, *self.prediction, *last]

    @property
    def all_letters(self) -> str:
        """The families of all layers, those of prediction depths included."""
        return self.letters + self.depth_letters * self.depths

    @property
    def numbered(self) -> list[tuple[int, str]]:
        """Number and family of all layers, those of prediction depths included."""
        after = range(self.depths_from, self.depths_from + self.depths * len(self.depth_letters))
        return list(zip((*self.layers, *after), self.all_letters, strict=True))

    def of_end(self, place: str) -> list[BuiltParameter]:
        """Return the parameters of the embedding, of the head, or of the prediction depths beside
        their layers."""
        return [p for p in self.parameters if p.layer is None and p.end == place]

    @property
    def owners(self) -> list[int | None]:
        """Who may own side channels: the embedding (None) and its layers, by their numbers."""
        return [None] * self.owns_embedding + [*self.layers]

    def of_layer(self, layer: int) -> list[BuiltParameter]:
        """Return the parameters of a layer's family."""
        return [p for p in self.parameters if p.layer == layer and not p.is_side_channel]


@dataclass(frozen=True)
class BuiltStage:
    """What each rank of a pipeline stage holds: one chunk, or one per virtual stage."""

    pp_rank: int
    chunks: tuple[BuiltChunk, ...]

    @property
    def parameters(self) -> Iterator[BuiltParameter]:
        """All parameters of the stage."""
        return (p for chunk in self.chunks for p in chunk.parameters)

    @property
    def places(self) -> list[str]:
        """The places of all chunks."""
        return [place for chunk in self.chunks for place in chunk.places]


def build_stages(job: Job) -> list[BuiltStage]:
    """Build one rank of every pipeline stage of ``job``.

    Within a process group a child process does this, because Megatron's groups are global to a
    process.

    Raises:
        UserError: the model cannot be built.
    """
    # Batch, kernels and replicas change no shape: jobs that differ only in them share the stages.
    smallest = dataclasses.replace(job.layout, world_size=None)
    return list(_build_stages(Job(job.model, smallest, precision=job.precision)))


@lru_cache(maxsize=256)
def _build_stages(job: Job) -> tuple[BuiltStage, ...]:
    if torch.distributed.is_initialized():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            return child.submit(_build_stages, job).result()
    stride = job.layout.minimal_world_size // job.layout.pp
    return tuple(build_rank(job, stage * stride) for stage in range(job.layout.pp))


def build_rank(job: Job, rank: int) -> BuiltStage:
    """Build what ``rank`` of the job's world has; the process must not have process groups."""
    layout = job.layout
    with fake_rank(layout, rank), torch.device("meta"):
        chunks = build_hybrid_chunks(job.config(), TorchBackend())
        if job.precision == "bf16":
            chunks = [chunk.bfloat16() for chunk in chunks]  # as Megatron's Float16Module does
        place = layout.rank_coordinates(rank)
        return BuiltStage(
            place.pp,
            tuple(
                read_chunk(chunk, layout.chunk_index(place.pp, virtual))
                for virtual, chunk in enumerate(chunks)
            ),
        )


def read_chunk(chunk: Any, index: int = 0) -> BuiltChunk:
    """Return what a rank holds of a built model chunk.

    Args:
        chunk: without the wrappers of data parallelism and of precision.
        index: in the order of depth.
    """
    shapes: dict[int, tuple[int, tuple[int, ...]]] = {}
    state = chunk.sharded_state_dict(prefix="", metadata=sharding_metadata())
    for item in nested_values(state):
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and item.data is not None:
            shapes[id(item.data)] = _global_shape(item)
    decoder, depths = chunk.decoder, getattr(chunk, "mtp", None)
    inside = () if depths is None else depths.layers[0].mtp_model_layer.families
    parameters = []
    for name, parameter in chunk.named_parameters():
        stacked, global_shape = shapes[id(parameter)]
        parts = name.split(".")
        parameters.append(
            BuiltParameter(
                name,
                _layer(decoder.layer_range, chunk.config.num_layers, len(inside), parts),
                (1,) * stacked + tuple(parameter.shape),
                global_shape,
                is_expert=not getattr(parameter, "allreduce", True),
                sequence_parallel=getattr(parameter, "sequence_parallel", False),
                sums_over_tp=getattr(parameter, "sums_over_tp", False),
                shared_embedding=getattr(parameter, "shared_embedding", False),
                element_size=parameter.element_size(),
            )
        )
    return BuiltChunk(
        index,
        range(decoder.layer_range.start, decoder.layer_range.stop),
        "".join(family.value for family in decoder.families),
        chunk.pre_process,
        chunk.post_process,
        tuple(parameters),
        "".join(family.value for family in inside),
        0 if depths is None else len(depths.layers),
        chunk.config.num_layers,
    )


def _layer(layers: Sequence[int], depth: int, inside: int, parts: list[str]) -> int | None:
    """Return the global number of a parameter's layer. Side channels are named by it.

    Args:
        layers: numbers of the chunk's layers.
        depth: of the decoder.
        inside: layers of a prediction depth.
        parts: of the parameter's name.
    """
    if parts[:2] == ["mtp", "layers"] and parts[3:5] == ["mtp_model_layer", "layers"]:
        return depth + int(parts[2]) * inside + int(parts[5])
    if parts[:2] == ["decoder", "layers"]:
        return layers[int(parts[2])]
    return int(parts[2]) if parts[:2] == ["decoder", "side_channels"] else None


def _global_shape(item: ShardedTensor | ShardedTensorFactory) -> tuple[int, tuple[int, ...]]:
    """Return the number of leading axes that experts are stacked on, and the whole shape.

    A factory saves one parameter as several tensors, cut from it along one axis.
    """
    parts = [item] if isinstance(item, ShardedTensor) else list(nested_values(item.build()))
    by_key = {part.key: part for part in parts}
    shapes = [part.global_shape for part in by_key.values()]
    first = parts[0]
    if len(shapes) == 1:
        return first.prepend_axis_num, tuple(first.global_shape)
    assert item.data is not None
    cut = next(
        axis
        for axis, size in enumerate(item.data.shape)
        if size != first.local_shape[axis - item.data.dim()]
    )
    axis = cut + first.prepend_axis_num
    whole = list(shapes[0])
    whole[axis] = sum(shape[axis] for shape in shapes)
    return first.prepend_axis_num, tuple(whole)


class ComposedStages:
    """The stages of a job's model in any layout.

    The parameters of a composed chunk keep the names and layer numbers of the small models that
    they were read off.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        pattern = job.config().pattern
        self.letters, self.depths = pattern.letters, pattern.mtp_num_depths
        self.depth_letters = pattern.mtp_letters
        self._places: dict[tuple[Any, ...], dict[str, tuple[BuiltParameter, ...]]] = {}
        self._chunks: dict[tuple[Any, ...], BuiltChunk] = {}
        self._channels: dict[tuple[Any, ...], tuple[BuiltParameter, ...]] = {}

    def places(self, layout: ParallelLayout) -> dict[str, tuple[BuiltParameter, ...]]:
        """Return the parameters of one layer of each family, of ``embedding`` and of ``head``."""
        key = (layout.tp, layout.sp, layout.pp > 1, layout.ep, layout.etp)
        if key not in self._places:
            self._places[key] = self._build_places(layout)
        return self._places[key]

    def stage(self, layout: ParallelLayout, pp_rank: int, chunks: Sequence[range]) -> BuiltStage:
        """Return stage ``pp_rank`` of the pipeline whose chunks hold the given layers."""
        mine = [layout.chunk_index(pp_rank, virtual) for virtual in range(layout.vpp or 1)]
        return BuiltStage(pp_rank, tuple(self._chunk(layout, index, chunks) for index in mine))

    def _chunk(self, layout: ParallelLayout, index: int, chunks: Sequence[range]) -> BuiltChunk:
        layers = chunks[index]
        key = (layout.tp, layout.sp, layout.ep, layout.etp, index, len(chunks), layers)
        if key not in self._chunks:
            letters = self.letters[layers.start : layers.stop]
            last = index == len(chunks) - 1
            chunk = BuiltChunk(
                *(index, layers, letters, index == 0, last, ()),
                *(self.depth_letters, self.depths * last, len(self.letters)),
            )
            parameters = self.places(layout)
            copied = chunk.depths and not chunk.owns_embedding
            inside = list(parameters["embedding"]) if copied else []
            inside += [p for place in chunk.places for p in parameters[place]]
            for layer in layers:
                inside += self._side_channels(layout, layer)
            self._chunks[key] = dataclasses.replace(chunk, parameters=tuple(inside))
        return self._chunks[key]

    def _side_channels(self, layout: ParallelLayout, layer: int) -> tuple[BuiltParameter, ...]:
        """Return the parameters of the side channels that a layer owns."""
        declared = self._job.model.get("side_channels")
        owned = channels_at(read_side_channels(declared), layer)
        key = (layout.tp, layout.sp, *(channel.name for channel in owned))
        if owned and key not in self._channels:
            alone = [{**asdict(channel), "owner": [0]} for channel in owned]
            dense = ParallelLayout(
                tensor_model_parallel_size=layout.tp,
                sequence_parallel=layout.sp,
                expert_tensor_parallel_size=1,
            )
            (stage,) = self._build(dense, self.letters[layer], alone)
            found = tuple(p for p in stage.parameters if p.is_side_channel)
            self._channels[key] = found
        return self._channels[key] if owned else ()

    def _build_places(self, layout: ParallelLayout) -> dict[str, tuple[BuiltParameter, ...]]:
        letters = "".join(dict.fromkeys(self.letters + self.depth_letters))
        predicted = MTP + letters[0] if self.depths else ""
        # Two stages wherever there are several: a head that is tied to the embedding then has a
        # copy of its own.
        stages = min(layout.pp, 2)
        dense = ParallelLayout(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            pipeline_model_parallel_size=stages,
            expert_tensor_parallel_size=1,
        )
        main = letters + CUT + letters[0] if stages > 1 else letters
        built = self._build(dense, main + predicted)
        first, last = built[0].chunks[0].parameters, built[-1].chunks[-1]
        places = {
            letter: tuple(p for p in first if p.layer == layer and not p.is_expert)
            for layer, letter in enumerate(letters)
        }
        places["embedding"] = tuple(p for p in first if p.name.startswith("embedding."))
        places["head"] = tuple(last.of_end("head"))
        if self.depths:
            places[PREDICTION] = tuple(last.of_end(PREDICTION))
        if Family.EXPERT.value in letters:
            experts = ParallelLayout(
                expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp
            )
            (stage,) = self._build(experts, Family.EXPERT.value)
            places[Family.EXPERT.value] += tuple(p for p in stage.parameters if p.is_expert)
        return places

    def _build(
        self,
        layout: ParallelLayout,
        pattern: str,
        side_channels: list[dict[str, Any]] | None = None,
    ) -> list[BuiltStage]:
        """Build a small model; with the embedding's side channels if none are given."""
        depth = len(pattern.partition(MTP)[0].replace(CUT, ""))
        model = {**self._job.model, "hybrid_pattern": pattern, "num_layers": depth}
        known = read_side_channels(model.get("side_channels"))
        model["side_channels"] = side_channels or [asdict(c) for c in channels_at(known, None)]
        model["mtp_num_layers"] = None  # the pattern says it
        model = with_modules_of(model, {*pattern} - {CUT, MTP})
        return build_stages(dataclasses.replace(self._job, model=model, layout=layout))
