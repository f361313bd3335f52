"""A plan as plain data: the schema of ``nemo-megacpp plan --json``.

Version 1. Every size is in bytes, every shape a list; keys are only ever added within a version::

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
    stages: [{stage, first_rank, ranks, chunks: [{index, first_layer, layers, embedding, head}],
        parameters, memory: {parameters, gradients, optimizer, activations, total,
        activations_per_microbatch, in_flight, exact: [...], formula: [...]},
        microbatch: [{place, layers, collectives: [COLLECTIVE]}], step: [COLLECTIVE],
        traffic: [{group, calls, tensor_bytes, sent_bytes, between_nodes}]}]
    costs: [{axis, effect, message}]

where COLLECTIVE is ``{kind, group, bytes, phase, role, what, count, neighbour}``, of one layer in
one microbatch, or of one step; see :class:`nemo_megacpp.formulas.collectives.Collective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nemo_megacpp.contract.plan import Plan, StagePlan
from nemo_megacpp.layout import ParallelLayout, Violation

SCHEMA = 1


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return ``plan`` as plain data."""
    job, config = plan.job, plan.sizes.config
    return {
        "schema": SCHEMA,
        "job": {
            "name": job.name,
            "layout": job.layout.short(),
            "world_size": job.layout.world,
            "micro_batch_size": job.micro_batch_size,
            "global_batch_size": job.global_batch_size,
            "num_microbatches": job.num_microbatches,
            "seq_length": config.seq_length,
            "precision": job.precision,
            "use_distributed_optimizer": job.use_distributed_optimizer,
            "kernels": job.kernels,
            "gpus_per_node": job.gpus_per_node,
            "hbm_bytes": job.hbm_bytes,
        },
        "legal": True,
        "parameters": plan.parameters,
        "fits": plan.fits,
        "fullest_stage": plan.fullest.pp_rank,
        "between_nodes_per_step": plan.between_nodes,
        "groups": [asdict(group) for group in plan.groups],
        "ownership": [asdict(owned) for owned in plan.owned],
        "activations": {
            place: [kept._asdict() for kept in items] for place, items in plan.activations.items()
        },
        "stages": [_stage(stage) for stage in plan.stages],
        "costs": [cost._asdict() for cost in plan.costs],
    }


def refusal_document(
    layout: ParallelLayout, violations: Sequence[Violation], nearest: Sequence[ParallelLayout]
) -> dict[str, Any]:
    """Return the answer to an illegal layout as plain data."""
    return {
        "schema": SCHEMA,
        "layout": layout.short(),
        "legal": False,
        "violations": [asdict(violation) for violation in violations],
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
