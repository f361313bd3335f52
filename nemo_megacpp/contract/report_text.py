"""A plan for a terminal: rich tables, from the whole down to one family or stage."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from nemo_megacpp.contract.activations import Kept
from nemo_megacpp.contract.collectives import Collective
from nemo_megacpp.contract.plan import Plan, StagePlan
from nemo_megacpp.contract.units import show_bytes

_NAMES = {"A": "attention", "M": "Mamba", "E": "experts", "R": "recurrent"}


def print_plan(
    console: Console, plan: Plan, family: str | None = None, stage: int | None = None
) -> None:
    """Print ``plan``.

    Args:
        console: where to.
        plan: the plan.
        family: a place (``A``, ``M``, ``E``, ``R``, ``embedding``, ``head``) to show in detail:
            its parameters, collectives and activations.
        stage: show the traffic of this stage's ranks; that of the fullest if not given.
    """
    shown = plan.fullest if stage is None else plan.stages[stage]
    _head(console, plan)
    if family is not None:
        _ownership(console, plan, family)
        _collectives(console, plan, family)
        _activations(console, plan, family)
        return
    _stages(console, plan, plan.stages if stage is None else (shown,))
    _families(console, plan)
    _groups(console, plan)
    _traffic(console, shown)
    if stage is not None:
        _once_per_step(console, shown)
    _costs(console, plan)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1))
    for index, column in enumerate(columns):
        text = column.startswith("<")
        table.add_column(
            column.lstrip("<"), justify="left" if text or index == 0 else "right", overflow="fold"
        )
    return table


def _head(console: Console, plan: Plan) -> None:
    job = plan.job
    console.print(
        f"[bold]{job.name}[/bold]: {plan.parameters:,} parameters, {job.layout.describe()}, "
        f"{job.gpus_per_node} GPUs a node"
    )
    optimizer = "distributed" if job.use_distributed_optimizer else "on every replica"
    kernels = (
        "Transformer Engine and mamba_ssm; activations by formula, not measured on a GPU"
        if job.kernels == "gpu"
        else "plain torch; activations by formula, held to recorded runs"
    )
    console.print(
        f"{job.precision}, {job.global_batch_size} rows of {plan.sizes.config.seq_length:,} tokens "
        f"a step in {job.num_microbatches} microbatches of {job.micro_batch_size} a replica, "
        f"optimizer state {optimizer}; kernels: {kernels}\n"
    )


def _stages(console: Console, plan: Plan, stages: Iterable[StagePlan]) -> None:
    limit = plan.job.hbm_bytes
    table = _table(
        "Stages and memory of one rank (exact; activations by formula)",
        "stage",
        "<ranks",
        "<layers",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "in flight",
        "total",
        *(["of the GPU"] if limit else []),
    )
    for stage in stages:
        memory, chunks = stage.memory, stage.built.chunks
        ends = ["embedding"] if any(c.owns_embedding for c in chunks) else []
        ends += ["head"] if any(c.owns_head for c in chunks) else []
        table.add_row(
            str(stage.pp_rank),
            f"{stage.first_rank}-{stage.first_rank + stage.ranks - 1}",
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
    console.print(table)
    fullest = plan.fullest.memory
    if limit:
        verdict = "fits" if plan.fits else "[red]does not fit[/red]"
        console.print(
            f"The fullest rank, on stage {plan.fullest.pp_rank}, holds {show_bytes(fullest.total)} "
            f"and {verdict} {show_bytes(limit)}; not counted: temporaries, fragmentation, the "
            f"communication library's buffers."
        )
    console.print()


def _families(console: Console, plan: Plan) -> None:
    table = _table(
        "One layer, one microbatch, one rank (--family for its parameters and collectives)",
        "family",
        "layers",
        "parameters",
        "activations",
        "sent forward",
        "sent backward",
        "<over",
    )
    for place, kept in plan.activations.items():
        collectives = _of_place(plan, place)
        owned = [item for item in plan.owned if item.family == place]
        parameters = sum(item.local_numel for item in owned)
        forward = [made for made in collectives if made.phase == "forward"]
        backward = [made for made in collectives if made.phase != "forward"]
        table.add_row(
            f"{place} {_NAMES.get(place, '')}".strip(),
            str(plan.sizes.config.pattern.letters.count(place) if place in _NAMES else 1),
            f"{parameters / 1e6:,.2f} M",
            show_bytes(sum(item.bytes for item in kept)),
            show_bytes(_sent(forward, plan)),
            show_bytes(_sent(backward, plan)),
            ", ".join(dict.fromkeys(made.group for made in collectives)) or "-",
        )
    console.print(table)
    console.print()


def _groups(console: Console, plan: Plan) -> None:
    table = _table("Groups", "group", "size", "how many", "nodes each", "<of rank 0")
    for group in plan.groups:
        ranks = ", ".join(map(str, group.example[:9])) + (", …" if group.size > 9 else "")
        nodes = str(group.nodes) if group.nodes == 1 else f"[yellow]{group.nodes}[/yellow]"
        table.add_row(group.name, str(group.size), str(group.groups), nodes, ranks)
    console.print(table)
    console.print()


def _traffic(console: Console, stage: StagePlan) -> None:
    table = _table(
        f"What a rank of stage {stage.pp_rank} sends in one step",
        "group",
        "calls",
        "tensors",
        "sent",
        "between nodes",
    )
    for item in stage.traffic:
        table.add_row(
            item.group,
            f"{item.calls:,}",
            show_bytes(item.tensor_bytes),
            show_bytes(item.sent_bytes),
            show_bytes(item.between_nodes) if item.between_nodes else "-",
        )
    table.add_row(
        "all",
        f"{sum(item.calls for item in stage.traffic):,}",
        show_bytes(sum(item.tensor_bytes for item in stage.traffic)),
        show_bytes(sum(item.sent_bytes for item in stage.traffic)),
        show_bytes(sum(item.between_nodes for item in stage.traffic)),
        style="bold",
    )
    console.print(table)
    console.print()


def _once_per_step(console: Console, stage: StagePlan) -> None:
    table = _table("Once per step", "<collective", "<group", "bytes", "count", "<of")
    for made in stage.step:
        table.add_row(made.kind, made.group, show_bytes(made.bytes), str(made.count), made.what)
    console.print(table)
    console.print()


def _ownership(console: Console, plan: Plan, family: str) -> None:
    table = _table(
        f"Who owns {family}",
        "parameter",
        "<whole",
        "<on a rank",
        "<split",
        "<per axis",
        "<gradient",
    )
    for owned in plan.owned:
        if owned.family == family:
            words = ", ".join(f"{word} on {axis}" for axis, word in owned.on.items())
            table.add_row(
                owned.name,
                _shape(owned.global_shape),
                _shape(owned.local_shape),
                ", ".join(owned.split) or "whole" + (f": {owned.why}" if owned.why else ""),
                words or "-",
                ", then ".join(owned.gradient),
            )
    console.print(table)
    console.print()


def _collectives(console: Console, plan: Plan, family: str) -> None:
    table = _table(
        f"What one {family} sends in one microbatch",
        "phase",
        "<collective",
        "<group",
        "bytes",
        "count",
        "<role",
        "<of",
    )
    for made in _of_place(plan, family):
        table.add_row(
            made.phase,
            made.kind,
            made.group,
            show_bytes(made.bytes),
            str(made.count),
            made.role,
            made.what,
        )
    console.print(table)
    console.print()


def _activations(console: Console, plan: Plan, family: str) -> None:
    kept: tuple[Kept, ...] = plan.activations[family]
    table = _table(f"What one {family} keeps of one microbatch (formula)", "tensor", "bytes")
    for item in kept:
        table.add_row(item.what, show_bytes(item.bytes))
    table.add_row("all", show_bytes(sum(item.bytes for item in kept)), style="bold")
    console.print(table)


def _costs(console: Console, plan: Plan) -> None:
    if not plan.costs:
        return
    console.print("[bold]What this layout costs[/bold]")
    for cost in plan.costs:
        console.print(f"  {cost.axis} {cost.effect} {cost.message}", highlight=False)


def _of_place(plan: Plan, place: str) -> list[Collective]:
    for stage in plan.stages:
        for name, _, collectives in stage.microbatch:
            if name == place:
                return list(collectives)
    return []


def _sent(collectives: Iterable[Collective], plan: Plan) -> float:
    sizes = {group.name: group.size for group in plan.groups}
    return sum(made.wire_bytes(sizes[made.group]) for made in collectives)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
