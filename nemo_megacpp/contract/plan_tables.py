"""A plan as tables, and as lines around them, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape

from nemo_megacpp.contract.layout_plan import Plan, StagePlan
from nemo_megacpp.contract.sequence_state import state_line
from nemo_megacpp.contract.step_tables import assumptions, parts_table
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.saved import total
from nemo_megacpp.pattern import Family
from nemo_megacpp.render import Cell, Table, Toned, print_table, show_bytes
from nemo_megacpp.side_channels import channel_places, is_channel_place

NOT_COUNTED = "temporaries, fragmentation, the communication library's buffers"
_EXAMPLE = 9
"""Ranks of a group that are listed."""


def print_plan(
    console: Console, plan: Plan, family: str | None = None, stage: int | None = None
) -> None:
    """Print ``plan`` in a terminal.

    Args:
        console: of the terminal.
        plan: the plan.
        family: a place (a family's letter, ``embedding``, ``head``) to show in detail: its
            parameters, collectives and activations.
        stage: show the traffic of this stage's ranks; of the fullest stage if not given.
    """
    console.print(f"[bold]{escape(plan.job.name)}[/bold]: {layout_line(plan)}")
    console.print(f"{run_line(plan)}\n")
    if family is not None:
        for table in (ownership_table(plan, family), collective_table(plan, family)):
            print_table(console, table)
            console.print()
        print_table(console, activation_table(plan, family))
        return
    shown = plan.fullest if stage is None else plan.stages[stage]
    print_table(console, stage_table(plan, plan.stages if stage is None else (shown,)))
    if plan.fits is not None:
        style = None if plan.fits else "red"
        console.print(f"{verdict(plan)}; not counted: {NOT_COUNTED}.", style=style)
    tables = [family_table(plan), group_table(plan), traffic_table(shown)]
    if plan.cuts and stage is None:
        tables.append(cut_table(plan))
    for table in [*tables, step_table(shown)] if stage is not None else tables:
        console.print()
        print_table(console, table)
    if plan.machine is not None and plan.step is not None:
        console.print()
        print_table(console, parts_table(plan.step, plan.machine, plan.job.precision))
        console.print(assumptions(plan.machine), highlight=False, markup=False)
    state = state_line(plan.sizes)
    if state is not None:
        console.print(f"\n{state}", highlight=False, markup=False)
    if plan.costs:
        console.print("\n[bold]What this layout costs[/bold]")
    for cost in plan.costs:
        console.print(f"  {cost.message}", highlight=False, markup=False)


def layout_line(plan: Plan) -> str:
    """Return the model's size and the layout."""
    job = plan.job
    return (
        f"{plan.parameters:,} parameters, {job.layout.describe()}, {job.gpus_per_node} GPUs a node"
    )


def run_line(plan: Plan) -> str:
    """Return batch, precision, optimizer and kernels."""
    job = plan.job
    optimizer = "distributed" if job.use_distributed_optimizer else "on every replica"
    kernels = (
        "Transformer Engine and mamba_ssm; activations by formula, not measured on a GPU"
        if job.kernels == "gpu"
        else "plain torch; activations by formula, compared with recorded runs"
    )
    return (
        f"{job.precision}, {job.global_batch_size} rows of {plan.sizes.config.seq_length:,} tokens "
        f"a step in {job.num_microbatches} microbatches of {job.micro_batch_size} a replica, "
        f"optimizer state {optimizer}; kernels: {kernels}"
    )


def verdict(plan: Plan) -> str:
    """Return whether the fullest rank fits the GPU, which the job must name."""
    assert plan.job.hbm_bytes is not None
    return (
        f"The fullest rank, on stage {plan.fullest.pp_rank}, holds "
        f"{show_bytes(plan.fullest.memory.total)} and {'fits' if plan.fits else 'does not fit'} "
        f"{show_bytes(plan.job.hbm_bytes)}"
    )


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
        memory = stage.memory
        ends = [end for end in stage.built.places if end in ("embedding", "head")]
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
    sizes = {group.name: group.size for group in plan.groups}

    def sent(collectives: Iterable[Collective]) -> str:
        return show_bytes(sum(made.wire_bytes(sizes[made.group]) for made in collectives))

    for place, saved in plan.activations.items():
        collectives = plan.collectives_of(place)
        owned = [item for item in plan.owned if item.family == place]
        table.add(
            place_name(place),
            str(_layers_of(plan, place)),
            f"{sum(item.local_numel for item in owned) / 1e6:,.2f} M",
            show_bytes(total(saved)),
            sent(made for made in collectives if made.phase == "forward"),
            sent(made for made in collectives if made.phase != "forward"),
            ", ".join(dict.fromkeys(made.group for made in collectives)) or "-",
        )
    return table


def _layers_of(plan: Plan, place: str) -> int:
    """Return how often the whole model has a place."""
    if is_channel_place(place):
        owners = (None, *range(len(plan.sizes.letters)))
        return channel_places(plan.sizes.config.side_channels, owners).count(place)
    if place in ("embedding", "head"):
        return 1
    return [*plan.sizes.letters, *plan.sizes.prediction].count(place)


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
    sums = (
        sum(getattr(item, name) for item in stage.traffic)
        for name in ("tensor_bytes", "sent_bytes", "between_nodes")
    )
    calls = sum(item.calls for item in stage.traffic)
    table.total = ("all", f"{calls:,}", *map(show_bytes, sums))
    return table


def cut_table(plan: Plan) -> Table:
    """Return what crosses each pipeline cut."""
    table = Table(
        ("<cut before layer", "<between", "bytes", "<of"),
        "What crosses each cut in one microbatch of a rank, forward; its gradient comes back",
    )
    for cut in plan.cuts:
        parts = (f"{name} {show_bytes(size)}" for name, size in cut.items.items())
        what = ", ".join(parts) if len(cut.items) > 1 else next(iter(cut.items))
        table.add(str(cut.layer), cut.between, show_bytes(cut.bytes), what)
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
                " x ".join(map(str, owned.global_shape)),
                " x ".join(map(str, owned.local_shape)),
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
    table = Table(("<tensor", "bytes"), f"What one {place} saves of one microbatch (formula)")
    for item in plan.activations[place]:
        table.add(item.what, show_bytes(item.bytes))
    table.total = ("all", show_bytes(total(plan.activations[place])))
    return table
