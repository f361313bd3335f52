"""The estimated time of a training step, and where it goes.

A stage computes its layers and makes their collectives in turn, for each microbatch; collectives of
TP, CP, EP and PP are exposed. The slowest stage sets the pace, and the others' share of one
microbatch is the bubble. Gradients are then reduced and parameters gathered, behind the last
backward and the first forward pass where Megatron overlaps them. The optimizer moves its state
through memory. Peaks and efficiencies are a :class:`nemo_megacpp.contract.machine.Machine`'s; every
efficiency is an assumption.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_megacpp.contract.collective_time import CollectiveTime
from nemo_megacpp.contract.layer_time import LayerTime, LayerTimes
from nemo_megacpp.contract.machine import Machine
from nemo_megacpp.contract.memory import Buffer, StageMemory
from nemo_megacpp.contract.recompute import recomputed_layers
from nemo_megacpp.contract.stages import BuiltParameter, BuiltStage
from nemo_megacpp.contract.traffic import (
    depth_state_collectives,
    pipeline_messages,
    place_collectives,
    step_collectives,
)
from nemo_megacpp.contract.work import FORWARD_AND_BACKWARD, one_depth
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.collectives import again
from nemo_megacpp.formulas.sizes import PREDICTION, Sizes
from nemo_megacpp.pattern import Family
from nemo_megacpp.side_channels import channel_places, is_channel_place

Places = Mapping[str, Sequence[BuiltParameter]]
"""A rank's parameters of one layer of each family, by letter, of ``embedding`` and ``head``."""

ENDS, CHANNELS, AGAIN = "ends", "side channels", "recompute"
REDUCED, GATHERED = "gradients", "parameters"
OPTIMIZER, BUBBLE = "optimizer", "bubble"
_AXIS = {"tp-cp": "tp", "etp": "ep", "etp-ep": "ep"}
"""Axis under which a group's collectives are shown, where it is not the group's name."""
_OPTIMIZER_PASSES = 2.5
"""Bytes that Adam moves over those of its state: 30 to 12 for a bf16 parameter."""


@dataclass(frozen=True)
class StepTime:
    """An estimate of a training step.

    Attributes:
        parts: seconds on a rank of the slowest stage, by what takes them: a family's letter (its
            computation), ``ends`` (embedding, head and loss), ``side channels``, ``recompute``,
            exposed collectives by axis (``tp``, ``cp``, ``ep``, ``pp``), ``gradients``,
            ``parameters``, ``optimizer`` and ``bubble``.
        slowest_stage: the pipeline stage that sets the pace.
        tokens_per_gpu: tokens a second and GPU.
        flops_per_gpu: model FLOPs a second and GPU.
        utilization: ``flops_per_gpu`` over the GPU's peak (MFU).
    """

    parts: dict[str, float]
    slowest_stage: int
    tokens_per_gpu: float
    flops_per_gpu: float
    utilization: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Microbatch:
    """Seconds of one microbatch on a stage; ``first`` and ``last`` are its forward and backward."""

    parts: dict[str, float]
    first: float
    last: float


class StepEstimator:
    """Estimates the steps of one model on one machine, in any layout.

    Args:
        machine: the machine.
        whole: the model on one rank, without any parallelism.
        work: operations per token of each place (:func:`nemo_megacpp.contract.work.work_of`).
    """

    def __init__(self, machine: Machine, whole: Sizes, work: Mapping[str, int]) -> None:
        self.machine = machine
        self._peak = machine.peak(whole.job.precision)
        self._layers = LayerTimes(machine, self._peak)
        mixing = {
            place: block_of(Family(place)).mixing for place in whole.places if len(place) == 1
        }
        self._mixing = {letter: count(whole) for letter, count in mixing.items() if count}
        operations = sum(
            work[place] for place in (*whole.letters, *whole.prediction, "embedding", "head")
        )
        self._operations = FORWARD_AND_BACKWARD * operations
        self._times: dict[tuple[object, ...], LayerTime] = {}
        self._sent: dict[tuple[object, ...], dict[str, float]] = {}

    def estimate(
        self,
        sizes: Sizes,
        places: Places,
        stages: Sequence[BuiltStage],
        memories: Sequence[StageMemory],
        buffers: Sequence[Sequence[Buffer]],
    ) -> StepTime:
        """Return the time of a step.

        Args:
            sizes: the job in its layout.
            places: the parameters of its layers.
            stages: of its pipeline.
            memories: of the stages.
            buffers: of the stages.
        """
        job, layout = sizes.job, sizes.layout
        ranks = layout.world // layout.pp
        links = [CollectiveTime(self.machine, layout, s.pp_rank * ranks) for s in stages]
        run = [self._microbatch(sizes, places, *pair) for pair in zip(stages, links, strict=True)]
        totals = [sum(one.parts.values()) for one in run]
        slowest = totals.index(max(totals))
        parts = {name: each * job.num_microbatches for name, each in run[slowest].parts.items()}
        parts[BUBBLE] = (sum(totals) - totals[slowest]) / (layout.vpp or 1)
        largest = max(range(len(stages)), key=lambda index: memories[index].gradients)
        reduced = gathered = 0.0
        for made in step_collectives(sizes, stages[largest], buffers[largest]):
            seconds = links[largest].seconds(made)
            if made.role == "parameter":
                gathered += seconds
            else:
                reduced += seconds
        hidden = run[largest]
        parts[REDUCED] = max(reduced - hidden.last * job.overlap_grad_reduce, 0.0)
        parts[GATHERED] = max(gathered - hidden.first * job.overlap_param_gather, 0.0)
        moved = max(_OPTIMIZER_PASSES * each.optimizer + each.gradients for each in memories)
        parts[OPTIMIZER] = moved / (self.machine.hbm_bandwidth * self.machine.efficiency.memory)
        seconds = sum(parts.values())
        tokens = job.global_batch_size * sizes.config.seq_length / (seconds * layout.world)
        flops = tokens * self._operations
        kept = {name: value for name, value in parts.items() if value}
        return StepTime(kept, slowest, tokens, flops, flops / self._peak)

    def _microbatch(
        self, sizes: Sizes, places: Places, stage: BuiltStage, links: CollectiveTime
    ) -> _Microbatch:
        parts: dict[str, float] = defaultdict(float)
        first = last = 0.0
        channels = sizes.config.side_channels
        present = Counter(stage.places)
        for chunk in stage.chunks:
            present.update(filter(None, channel_places(channels, chunk.owners)))
        for place, count in present.items():
            time = self._time(sizes, places, place)
            name = place if len(place) == 1 else CHANNELS if is_channel_place(place) else ENDS
            parts[name] += count * (time.forward + time.backward)
            parts[AGAIN] += count * time.again
            first += count * time.forward
            last += count * time.backward
            for axis, seconds in self._exposed(sizes, place, links, stage.pp_rank).items():
                parts[axis] += count * seconds
        for chunk in stage.chunks:
            repeated = Counter(recomputed_layers(sizes, chunk.letters))
            owners = chunk.layers[: repeated.total()]
            repeated.update(filter(None, channel_places(channels, owners)))
            for place, count in repeated.items():
                parts[AGAIN] += count * self._time(sizes, places, place).forward
                sent = self._exposed(sizes, place, links, stage.pp_rank, repeated=True)
                for axis, seconds in sent.items():
                    parts[axis] += count * seconds
        for made in depth_state_collectives(sizes, stage):
            parts[made.group] += links.seconds(made)
        if sizes.layout.pp > 1:
            parts["pp"] += links.total(pipeline_messages(sizes, stage))
        return _Microbatch(parts, first, last)

    def _time(self, sizes: Sizes, places: Places, place: str) -> LayerTime:
        key = (place, *_split(sizes))
        if key not in self._times:
            mixing = self._mixing.get(place, 0)
            self._times[key] = self._layers.of(sizes, place, places.get(place, ()), mixing)
        return self._times[key]

    def _exposed(
        self,
        sizes: Sizes,
        place: str,
        links: CollectiveTime,
        pp_rank: int,
        *,
        repeated: bool = False,
    ) -> dict[str, float]:
        """Return the seconds of one layer's collectives by axis, or of those that a recomputed
        layer repeats."""
        layout = sizes.layout
        start = pp_rank * (layout.world // layout.pp) % self.machine.gpus_per_node
        key = (place, repeated, start, *_split(sizes))
        if key not in self._sent:
            found: dict[str, float] = defaultdict(float)
            made_once = place_collectives(sizes, place)
            for made in again(made_once) if repeated else made_once:
                found[_AXIS.get(made.group, made.group)] += links.seconds(made)
            self._sent[key] = found
        return self._sent[key]


def _split(sizes: Sizes) -> tuple[object, ...]:
    """What of a layout, and of recompute, decides about the time of a layer."""
    layout, config = sizes.layout, sizes.config
    again = (config.recompute_granularity, tuple(config.recompute_modules or ()))
    return (layout.tp, layout.sp, layout.cp, layout.ep, layout.etp, *again)


def places_of(stages: Sequence[BuiltStage]) -> Places:
    """Return the parameters of the first layer of each family, and of the ends, of real stages."""
    found: dict[str, list[BuiltParameter]] = {}
    for chunk in (chunk for stage in stages for chunk in stage.chunks):
        first: dict[str, int] = {}
        for layer, letter in chunk.numbered:
            first.setdefault(letter, layer)
        for letter, layer in first.items():
            found.setdefault(letter, chunk.of_layer(layer))
        if chunk.owns_embedding:
            found["embedding"] = chunk.of_end("embedding")
        if chunk.owns_head:
            found["head"] = chunk.of_end("head")
        if chunk.depths:
            found[PREDICTION] = one_depth(chunk)
    return found
