"""The plan of a job: everything that the contract says, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_megacpp.contract.activations import (
    block_activations,
    embedding_activations,
    head_activations,
)
from nemo_megacpp.contract.build import BuiltStage, build_stages
from nemo_megacpp.contract.costs import Cost, costs
from nemo_megacpp.contract.memory import StageMemory, stage_memory
from nemo_megacpp.contract.ownership import OwnedParameter, ownership, parameter_count
from nemo_megacpp.contract.step import layer_collectives, step_collectives, whole_step
from nemo_megacpp.contract.traffic import Traffic, traffic
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.job import Job
from nemo_megacpp.formulas.placement import GROUPS, GroupFacts, group_facts, group_size
from nemo_megacpp.formulas.saved import Saved
from nemo_megacpp.formulas.sizes import Sizes, sizes_of_job
from nemo_megacpp.pattern import Family


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
    microbatch: tuple[tuple[str, int, tuple[Collective, ...]], ...]
    step: tuple[Collective, ...]
    traffic: tuple[Traffic, ...]

    @property
    def pp_rank(self) -> int:
        return self.built.pp_rank

    @property
    def letters(self) -> str:
        """Families of its layers, chunk by chunk, with ``|`` between chunks."""
        return "|".join(chunk.letters for chunk in self.built.chunks)

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
        activations: what one layer of each place keeps of one microbatch, by formula.
        costs: what the layout forces on, turns off, repeats or leaves idle.
    """

    sizes: Sizes
    parameters: int
    owned: tuple[OwnedParameter, ...]
    stages: tuple[StagePlan, ...]
    groups: tuple[GroupFacts, ...]
    activations: dict[str, tuple[Saved, ...]]
    costs: tuple[Cost, ...]

    @property
    def job(self) -> Job:
        return self.sizes.job

    @property
    def fullest(self) -> StagePlan:
        """The stage whose ranks hold most."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def fits(self) -> bool | None:
        """Whether the fullest rank fits the GPU; None if no GPU was named."""
        limit = self.job.hbm_bytes
        return None if limit is None else self.fullest.memory.total <= limit

    def collectives_of(self, place: str) -> tuple[Collective, ...]:
        """Return the collectives of one layer of ``place`` in one microbatch."""
        for stage in self.stages:
            for name, _, collectives in stage.microbatch:
                if name == place:
                    return collectives
        return ()

    @property
    def between_nodes(self) -> int:
        """Bytes that leave nodes in one step, over all ranks."""
        return sum(
            item.between_nodes * stage.ranks for stage in self.stages for item in stage.traffic
        )


def make_plan(job: Job) -> Plan:
    """Return the plan of ``job``, whose layout must be legal (:func:`nemo_megacpp.layout`).

    The cost grows with the pipeline's stages and the model's depth; how many ranks there are
    besides matters only where ranks are counted out into groups.

    Raises:
        UserError: the model cannot be built.
    """
    sizes, built = sizes_of_job(job), build_stages(job)
    letters = sizes.config.pattern.letters
    ranks = job.layout.world // job.layout.pp
    stages = tuple(_stage(sizes, stage, Family.EXPERT.value in letters, ranks) for stage in built)
    kinds = [group for group in GROUPS if group_size(job.layout, group) > 1]
    return Plan(
        sizes,
        parameter_count(built),
        tuple(ownership(job, built)),
        stages,
        tuple(group_facts(job.layout, group, job.gpus_per_node) for group in kinds),
        {
            "embedding": tuple(embedding_activations(sizes)),
            **{
                letter: tuple(block_activations(sizes, Family(letter)))
                for letter in dict.fromkeys(letters)
            },
            "head": tuple(head_activations(sizes)),
        },
        tuple(costs(sizes, built)),
    )


def _stage(sizes: Sizes, built: BuiltStage, has_experts: bool, ranks: int) -> StagePlan:
    first = built.pp_rank * ranks
    return StagePlan(
        built,
        first,
        ranks,
        stage_memory(sizes, built),
        tuple((place, n, tuple(made)) for place, n, made in layer_collectives(sizes, built)),
        tuple(step_collectives(sizes, built, has_experts)),
        tuple(
            traffic(
                sizes.layout,
                whole_step(sizes, built, has_experts),
                first,
                sizes.job.gpus_per_node,
            )
        ),
    )
