"""A plan as tables, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_megacpp.contract.plan import Plan, StagePlan
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.pattern import Family
from nemo_megacpp.render import Cell, Table, Toned, show_bytes

_EXAMPLE = 9
"""Ranks of a group that are listed."""


def place_name(place: str) -> str:
    """Return ``A attention`` for a family's letter; ``embedding`` and ``head`` as they are."""
    return f"{place} {block_of(Family(place)).name}".strip() if len(place) == 1 else place


def rank_range(stage: StagePlan) -> str:
    """Return ``3``, or ``0-7`` for several ranks."""
    last = stage.first_rank + stage.ranks - 1
    return f"{stage.first_rank}" if stage.ranks == 1 else f"{stage.first_rank}-{last}"


def stage_table(plan: Plan, stages: Iterable[StagePlan]) -> Table:
    """Return the layers and the memory of each stage."""
    limit = plan.job.hbm_bytes
    table = Table(
        (
            *("<stage", "<ranks", "<layers", "parameters", "weights", "gradients", "optimizer"),
            *("activations", "in flight", "total", *(["of the GPU"] if limit else [])),
        ),
        "Stages and memory of one rank (exact; activations by formula)",
    )
    for stage in stages:
        memory, chunks = stage.memory, stage.built.chunks
        ends = ["embedding"] if any(c.owns_embedding for c in chunks) else []
        ends += ["head"] if any(c.owns_head for c in chunks) else []
        table.add(
            str(stage.pp_rank),
            rank_range(stage),
            stage.letters + (f" + {', '.join(ends)}" if ends else ""),
            f"{stage.parameters / 1e6:,.1f} M",
            show_bytes(memory.parameters),
            show_bytes(memory.gradients),
            show_bytes(memory.optimizer),
            show_bytes(memory.activations),
            "+".join(map(str, memory.in_flight)),
            show_bytes(memory.total),
            *([f"{memory.total / limit:.0%}"] if limit else []),
        )
    return table


def family_table(plan: Plan) -> Table:
    """Return what one layer of each family holds and sends."""
    table = Table(
        (
            *("<family", "layers", "parameters", "activations"),
            *("sent forward", "sent backward", "<over"),
        ),
        "One layer, one microbatch, one rank (--family for its parameters and collectives)",
    )
    letters = plan.sizes.config.pattern.letters
    for place, kept in plan.activations.items():
        collectives = plan.collectives_of(place)
        owned = [item for item in plan.owned if item.family == place]
        forward = [made for made in collectives if made.phase == "forward"]
        backward = [made for made in collectives if made.phase != "forward"]
        table.add(
            place_name(place),
            str(letters.count(place) if len(place) == 1 else 1),
            f"{sum(item.local_numel for item in owned) / 1e6:,.2f} M",
            show_bytes(sum(item.bytes for item in kept)),
            show_bytes(_sent(forward, plan)),
            show_bytes(_sent(backward, plan)),
            ", ".join(dict.fromkeys(made.group for made in collectives)) or "-",
        )
    return table


def _sent(collectives: Iterable[Collective], plan: Plan) -> float:
    sizes = {group.name: group.size for group in plan.groups}
    return sum(made.wire_bytes(sizes[made.group]) for made in collectives)


def group_table(plan: Plan) -> Table:
    """Return the process groups with more than one rank."""
    table = Table(("<group", "size", "how many", "nodes each", "<of rank 0"), "Groups")
    for group in plan.groups:
        ranks = ", ".join(map(str, group.example[:_EXAMPLE]))
        nodes: Cell = str(group.nodes)
        table.add(
            group.name,
            str(group.size),
            str(group.groups),
            nodes if group.nodes == 1 else Toned(str(group.nodes), "warning"),
            ranks + (", …" if group.size > _EXAMPLE else ""),
        )
    return table


def traffic_table(stage: StagePlan) -> Table:
    """Return what a rank of ``stage`` sends in one step, by group."""
    table = Table(
        ("<group", "calls", "tensors", "sent", "between nodes"),
        f"What a rank of stage {stage.pp_rank} sends in one step",
    )
    for item in stage.traffic:
        table.add(
            item.group,
            f"{item.calls:,}",
            show_bytes(item.tensor_bytes),
            show_bytes(item.sent_bytes),
            show_bytes(item.between_nodes) if item.between_nodes else "-",
        )
    table.total = (
        "all",
        f"{sum(item.calls for item in stage.traffic):,}",
        show_bytes(sum(item.tensor_bytes for item in stage.traffic)),
        show_bytes(sum(item.sent_bytes for item in stage.traffic)),
        show_bytes(sum(item.between_nodes for item in stage.traffic)),
    )
    return table


def step_table(stage: StagePlan) -> Table:
    """Return the collectives that a rank of ``stage`` makes once per step."""
    table = Table(("<collective", "<group", "bytes", "count", "<of"), "Once per step")
    for made in stage.step:
        table.add(made.kind, made.group, show_bytes(made.bytes), str(made.count), made.what)
    return table


def ownership_table(plan: Plan, place: str) -> Table:
    """Return the parameters of one family, of the embedding, or of the head."""
    table = Table(
        ("<parameter", "<whole", "<on a rank", "<split", "<per axis", "<gradient"),
        f"Who owns {place}",
    )
    for owned in plan.owned:
        if owned.family == place:
            table.add(
                owned.name,
                _shape(owned.global_shape),
                _shape(owned.local_shape),
                ", ".join(owned.split) or "whole" + (f": {owned.why}" if owned.why else ""),
                ", ".join(f"{word} on {axis}" for axis, word in owned.on.items()) or "-",
                ", then ".join(owned.gradient),
            )
    return table


def collective_table(plan: Plan, place: str) -> Table:
    """Return the collectives of one layer in one microbatch."""
    table = Table(
        ("<phase", "<collective", "<group", "bytes", "count", "<role", "<of"),
        f"What one {place} sends in one microbatch",
    )
    for made in plan.collectives_of(place):
        size, count = show_bytes(made.bytes), str(made.count)
        table.add(made.phase, made.kind, made.group, size, count, made.role, made.what)
    return table


def activation_table(plan: Plan, place: str) -> Table:
    """Return the saved activations of one layer, of the embedding, or of the head."""
    kept = plan.activations[place]
    table = Table(("<tensor", "bytes"), f"What one {place} keeps of one microbatch (formula)")
    for item in kept:
        table.add(item.what, show_bytes(item.bytes))
    table.total = ("all", show_bytes(sum(item.bytes for item in kept)))
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
