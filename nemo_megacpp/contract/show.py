"""A plan for a terminal: from the whole down to one family or stage."""

from __future__ import annotations

from rich.console import Console

from nemo_megacpp.contract.plan import Plan
from nemo_megacpp.contract.tables import (
    activation_table,
    collective_table,
    family_table,
    group_table,
    ownership_table,
    stage_table,
    step_table,
    traffic_table,
)
from nemo_megacpp.render import Table, print_table, show_bytes


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
    _head(console, plan)
    if family is not None:
        _print(console, ownership_table(plan, family), collective_table(plan, family))
        print_table(console, activation_table(plan, family))
        return
    shown = plan.fullest if stage is None else plan.stages[stage]
    print_table(console, stage_table(plan, plan.stages if stage is None else (shown,)))
    _verdict(console, plan)
    _print(console, family_table(plan), group_table(plan), traffic_table(shown))
    if stage is not None:
        _print(console, step_table(shown))
    if plan.costs:
        console.print("[bold]What this layout costs[/bold]")
    for cost in plan.costs:
        console.print(f"  {cost.axis} {cost.effect} {cost.message}", highlight=False)


def _print(console: Console, *tables: Table) -> None:
    for table in tables:
        print_table(console, table)
        console.print()


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


def _verdict(console: Console, plan: Plan) -> None:
    limit = plan.job.hbm_bytes
    if limit:
        verdict = "fits" if plan.fits else "[red]does not fit[/red]"
        console.print(
            f"The fullest rank, on stage {plan.fullest.pp_rank}, holds "
            f"{show_bytes(plan.fullest.memory.total)} and {verdict} {show_bytes(limit)}; not "
            f"counted: temporaries, fragmentation, the communication library's buffers."
        )
    console.print()
