"""The plan of a job: the whole contract, in one object and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from nemo_megacpp.contract.costs import Cost, costs
from nemo_megacpp.contract.machine import Machine, machine_document
from nemo_megacpp.contract.memory import StageMemory, stage_buffers, stage_memory
from nemo_megacpp.contract.ownership import OwnedParameter, ownership, parameter_count
from nemo_megacpp.contract.recompute import Activations, saved_activations
from nemo_megacpp.contract.sequence_state import sequence_state
from nemo_megacpp.contract.stage_cuts import StageCut, stage_cuts
from nemo_megacpp.contract.stages import BuiltStage, build_stages
from nemo_megacpp.contract.step_tables import assumptions, step_document
from nemo_megacpp.contract.step_time import StepEstimator, StepTime, places_of
from nemo_megacpp.contract.traffic import (
    Traffic,
    depth_state_of,
    microbatch_collectives,
    step_collectives,
    traffic,
    whole_step,
)
from nemo_megacpp.contract.work import work_of
from nemo_megacpp.formulas.collectives import Collective, again
from nemo_megacpp.formulas.saved import Saved
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import LayoutViolation, ParallelLayout
from nemo_megacpp.layout.placement import GROUPS, GroupFacts, group_facts, group_size
from nemo_megacpp.pattern import CUT, MTP, Family

SCHEMA = 1
"""The schema of ``nemo-megacpp plan --json``, version 1. Every size is in bytes, every shape is a
list; keys are only ever added within a version::

    schema: 1
    job: name, layout (as ParallelLayout.parse reads it), world_size, micro_batch_size,
        global_batch_size, num_microbatches, seq_length, precision, use_distributed_optimizer,
        kernels, gpus_per_node, hbm_bytes
    legal: true          (an illegal layout: false, with violations and nearest, and nothing else)
    parameters: of the whole model
    fits: whether the fullest rank fits hbm_bytes; null without it
    fullest_stage, between_nodes_per_step (all ranks together)
    groups: [{name, size, groups, nodes, example}]
    ownership: [{family, name, layers, global_shape, local_shape, on: {axis: word}, split, why,
        gradient}]
    activations: {place: [{what, bytes}]}, one layer, one microbatch, by formula
    stages: [{stage, first_rank, ranks, chunks: [{index, first_layer, layers, embedding, head,
        depth_layers: of a prediction depth, depths}],
        parameters, memory: {parameters, gradients, optimizer, activations, total,
        activations_per_microbatch, in_flight, exact: [...], formula: [...]},
        microbatch: [{place, layers, collectives: [COLLECTIVE]}], step: [COLLECTIVE],
        traffic: [{group, calls, tensor_bytes, sent_bytes, between_nodes}]}]
    cuts: [{layer, between, items: {name: bytes}, seam, bytes}], of one microbatch, forward
    costs: [{axis, effect, message}]
    estimate: {seconds, parts: {part: seconds}, slowest_stage, tokens_per_second_per_gpu,
        model_flops_per_second_per_gpu, model_flops_utilization, machine, assumptions}
    inference_state: {letter: [{what, bytes, per_token}]}, of one layer and sequence on one rank,
        of one token where per_token; null where a family declares none

where COLLECTIVE is ``{kind, group, bytes, phase, role, what, count, neighbour}``, of one layer in
one microbatch, or of one step; see :class:`nemo_megacpp.formulas.collectives.Collective`.
"""
_JOB_FIELDS = (
    *("micro_batch_size", "global_batch_size", "precision", "use_distributed_optimizer"),
    *("kernels", "gpus_per_node", "hbm_bytes"),
)


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; all its ranks hold the same shapes.

    Attributes:
        built: its chunks and parameters, as one rank holds them.
        first_rank: the lowest global rank on the stage.
        ranks: how many there are; Megatron numbers them consecutively.
        memory: of the rank that holds most.
        microbatch: ``(place, how many layers, collectives of one layer in one microbatch)``.
        step: collectives once per step.
        traffic: totals of a step, by group.
    """

    built: BuiltStage
    first_rank: int
    ranks: int
    memory: StageMemory
    microbatch: tuple[tuple[str, int, list[Collective]], ...]
    step: tuple[Collective, ...]
    traffic: tuple[Traffic, ...]

    @property
    def pp_rank(self) -> int:
        return self.built.pp_rank

    @property
    def letters(self) -> str:
        """Families of its layers, chunk by chunk, with ``|`` between chunks, and ``/`` before each
        prediction depth."""
        return CUT.join(
            chunk.letters + (MTP + chunk.depth_letters) * chunk.depths
            for chunk in self.built.chunks
        )

    @property
    def parameters(self) -> int:
        """Parameters on one rank."""
        return sum(parameter.numel for parameter in self.built.parameters)


@dataclass(frozen=True)
class Plan:
    """What a job's layout means, before it runs.

    Attributes:
        sizes: the job, its configuration and the numbers that formulas are written in.
        parameters: of the whole model.
        owned: each parameter of each family: shapes, what splits it, how its gradient is summed.
        stages: one per pipeline stage.
        groups: every kind of process group with more than one rank.
        activations: what one layer of each place saves of one microbatch, by formula.
        costs: what the layout requires, turns off, repeats or leaves idle.
        machine: on which the step is estimated.
        step: the estimate; None without a machine.
    """

    sizes: Sizes
    parameters: int
    owned: tuple[OwnedParameter, ...]
    stages: tuple[StagePlan, ...]
    groups: tuple[GroupFacts, ...]
    activations: dict[str, tuple[Saved, ...]]
    costs: tuple[Cost, ...]
    machine: Machine | None = None
    step: StepTime | None = None

    @property
    def job(self) -> Job:
        return self.sizes.job

    @cached_property
    def cuts(self) -> list[StageCut]:
        """What crosses each pipeline cut."""
        chunks = (chunk for stage in self.stages for chunk in stage.built.chunks)
        firsts = [chunk.layers.start for chunk in chunks if not chunk.owns_embedding]
        return stage_cuts(self.sizes, firsts)

    @property
    def fullest(self) -> StagePlan:
        """The stage whose ranks hold most."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def fits(self) -> bool | None:
        """Whether the fullest rank fits the GPU; None if no GPU was named."""
        limit = self.job.hbm_bytes
        return None if limit is None else self.fullest.memory.total <= limit

    def collectives_of(self, place: str) -> list[Collective]:
        """Return the collectives of one layer of ``place`` in one microbatch, with those of R's
        depth state, which the first R block does not take and the last does not hand on."""
        found = next(
            (
                collectives
                for stage in self.stages
                for name, _, collectives in stage.microbatch
                if name == place
            ),
            [],
        )
        if place != Family.RECURRENT.value:
            return found
        taken, handed_on = depth_state_of(self.sizes)
        config = self.sizes.config
        if config.recompute_granularity == "full" or self.sizes.recomputes("m2rnn"):
            taken, handed_on = taken + again(taken), handed_on + again(handed_on)
        for made, where in ((taken, "but in the first R"), (handed_on, "but in the last R")):
            found = found + [replace(each, what=f"{each.what}, {where}") for each in made]
        return found

    @property
    def between_nodes(self) -> int:
        """Bytes that leave nodes in one step, over all ranks."""
        return sum(
            item.between_nodes * stage.ranks for stage in self.stages for item in stage.traffic
        )


def make_plan(job: Job, machine: Machine | None = None) -> Plan:
    """Return the plan of ``job``, whose layout must be legal (:func:`nemo_megacpp.layout`), with
    the estimated time of its step on ``machine``.

    The cost grows with the pipeline's stages and the model's depth; how many ranks there are
    besides matters only where ranks are counted out into groups.

    Raises:
        UserError: the model cannot be built.
    """
    sizes, built = Sizes(job), build_stages(job)
    owned = tuple(ownership(job, built))
    kinds = [group for group in GROUPS if group_size(job.layout, group) > 1]
    saved = Activations(sizes)
    return Plan(
        sizes,
        parameter_count(owned),
        owned,
        tuple(_plan_stage(sizes, stage, saved) for stage in built),
        tuple(group_facts(job.layout, group, job.gpus_per_node) for group in kinds),
        {place: tuple(saved_activations(sizes, place)) for place in sizes.places},
        tuple(costs(sizes, built)),
        machine,
        None if machine is None else _estimate(machine, sizes, built, saved),
    )


def _estimate(
    machine: Machine, sizes: Sizes, built: Sequence[BuiltStage], saved: Activations
) -> StepTime:
    job, places = sizes.job, places_of(built)
    buffers = [stage_buffers(job, stage) for stage in built]
    memories = [stage_memory(sizes, *pair, saved) for pair in zip(built, buffers, strict=True)]
    whole = Sizes(replace(job, layout=ParallelLayout()), sizes.config)
    estimator = StepEstimator(machine, whole, work_of(whole, places))
    return estimator.estimate(sizes, places, built, memories, buffers)


def _plan_stage(sizes: Sizes, built: BuiltStage, saved: Activations) -> StagePlan:
    layout, buffers = sizes.layout, stage_buffers(sizes.job, built)
    ranks = layout.world // layout.pp
    first = built.pp_rank * ranks
    sent = whole_step(sizes, [built], [buffers])
    return StagePlan(
        built,
        first,
        ranks,
        stage_memory(sizes, built, buffers, saved),
        tuple(microbatch_collectives(sizes, [built])),
        tuple(step_collectives(sizes, built, buffers)),
        tuple(traffic(layout, sent, first, sizes.job.gpus_per_node)),
    )


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return ``plan`` as plain data."""
    job, state = plan.job, sequence_state(plan.sizes)
    return {
        "schema": SCHEMA,
        "job": {
            "name": job.name,
            "layout": job.layout.short(),
            "world_size": job.layout.world,
            "num_microbatches": job.num_microbatches,
            "seq_length": plan.sizes.config.seq_length,
            **{name: getattr(job, name) for name in _JOB_FIELDS},
        },
        "legal": True,
        "parameters": plan.parameters,
        "fits": plan.fits,
        "fullest_stage": plan.fullest.pp_rank,
        "between_nodes_per_step": plan.between_nodes,
        "groups": [asdict(group) for group in plan.groups],
        "ownership": [asdict(owned) for owned in plan.owned],
        "activations": {
            place: [item._asdict() for item in items] for place, items in plan.activations.items()
        },
        "stages": [_stage(stage) for stage in plan.stages],
        "cuts": [{**cut._asdict(), "bytes": cut.bytes} for cut in plan.cuts],
        "costs": [cost._asdict() for cost in plan.costs],
        "estimate": _estimate_document(plan),
        "inference_state": state
        and {letter: [item._asdict() for item in items] for letter, items in state.items()},
    }


def _estimate_document(plan: Plan) -> dict[str, Any] | None:
    if plan.machine is None or plan.step is None:
        return None
    machine = {"machine": machine_document(plan.machine), "assumptions": assumptions(plan.machine)}
    return {**step_document(plan.step), **machine}


def refusal_document(
    layout: ParallelLayout, violations: Sequence[LayoutViolation], nearest: Sequence[ParallelLayout]
) -> dict[str, Any]:
    """Return the answer to an illegal layout as plain data."""
    return {
        "schema": SCHEMA,
        "layout": layout.short(),
        "legal": False,
        "violations": [
            {name: getattr(found, name) for name in ("axis", "rule", "message", "legal")}
            for found in violations
        ],
        "nearest": [other.short() for other in nearest],
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    memory = stage.memory
    return {
        "stage": stage.pp_rank,
        "first_rank": stage.first_rank,
        "ranks": stage.ranks,
        "chunks": [
            {
                "index": chunk.index,
                "first_layer": chunk.layers.start,
                "layers": chunk.letters,
                "embedding": chunk.owns_embedding,
                "head": chunk.owns_head,
                "depth_layers": chunk.depth_letters,
                "depths": chunk.depths,
            }
            for chunk in stage.built.chunks
        ],
        "parameters": stage.parameters,
        "memory": {
            **asdict(memory),
            "total": memory.total,
            "exact": ["parameters", "gradients", "optimizer"],
            "formula": ["activations", "activations_per_microbatch"],
        },
        "microbatch": [
            {
                "place": place,
                "layers": layers,
                "collectives": [asdict(made) for made in collectives],
            }
            for place, layers, collectives in stage.microbatch
        ],
        "step": [asdict(made) for made in stage.step],
        "traffic": [asdict(item) for item in stage.traffic],
    }
