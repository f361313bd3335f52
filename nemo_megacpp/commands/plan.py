"""``nemo-megacpp plan``: what a recipe's layout means, before it runs."""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import (
    add_recipe,
    print_json,
    read_count,
    read_gpu_memory,
    read_recipe,
)
from nemo_megacpp.errors import UserError
from nemo_megacpp.render import show_bytes

if TYPE_CHECKING:
    from nemo_megacpp.contract.layout_plan import Plan
    from nemo_megacpp.contract.machine import Machine
    from nemo_megacpp.formulas.sizes import Job
    from nemo_megacpp.recipes.recipe import Recipe

_WIDTH = 150
"""Columns of the tables."""


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "plan",
        help="show what a layout splits, sends, stores and costs, before the run",
        description="Show what a recipe's layout means: legality, who owns what, every collective, "
        "the memory of each stage, and what the layout costs. Needs no GPU.",
    )
    add_recipe(parser)
    add_hardware(parser)
    parser.add_argument("--family", metavar="A", help="one family in detail (also embedding, head)")
    parser.add_argument("--stage", type=int, metavar="0", help="one pipeline stage in detail")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", metavar="FILE", help="also write a self-contained web page")
    parser.add_argument(
        "--use-megatron-fsdp",
        action="store_true",
        help="show what a rank keeps under Megatron's FSDP, by sharding strategy, instead",
    )
    parser.add_argument(
        "--data-parallel-sharding-strategy",
        metavar="NAME",
        help="with --use-megatron-fsdp: optim, optim_grads or optim_grads_params; default: all",
    )
    parser.set_defaults(run=_run)


def add_hardware(parser: ArgumentParser) -> None:
    """Add ``--world-size``, ``--machine``, ``--gpus-per-node``, ``--hbm`` and ``--kernels``."""
    parser.add_argument("--world-size", metavar="N", help="ranks; default: the recipe's world_size")
    parser.add_argument(
        "--machine",
        metavar="NAME|FILE.json",
        help="dgx-h100, dgx-h200, gb200-nvl72, a100-pcie or what 'measure-machine' wrote: speeds, "
        "GPUs of a node and their memory; default: speeds of dgx-h100, memory not compared",
    )
    parser.add_argument("--gpus-per-node", metavar="N", help="default: --machine's, or 8")
    parser.add_argument(
        "--hbm",
        metavar="141GB",
        help="memory of a GPU, which a rank must fit; default: --machine's",
    )
    parser.add_argument(
        "--kernels",
        choices=("gpu", "torch"),
        default="gpu",
        help="whose activations are counted: Transformer Engine's and mamba_ssm's, or plain "
        "torch's; default: gpu",
    )


def read_hardware(args: Namespace) -> tuple[dict[str, Any], Machine]:
    """Return the fields of a `Job` that `add_hardware` has defined, and the machine.

    Raises:
        UserError: an option that cannot be read, or contradicts ``--machine``.
    """
    from nemo_megacpp.contract.machine_presets import DEFAULT, find_machine

    machine = find_machine(DEFAULT if args.machine is None else args.machine)
    gpus = machine.gpus_per_node
    if args.gpus_per_node is not None:
        gpus = read_count("--gpus-per-node", args.gpus_per_node)
    hbm = None if args.machine is None else machine.hbm_bytes
    if args.hbm is not None:
        hbm = read_gpu_memory(args.hbm)
    if args.machine is not None:
        if gpus > machine.gpus_per_node:
            raise UserError(
                f"--gpus-per-node {gpus} is more than a node of --machine {args.machine} has, "
                f"{machine.gpus_per_node}. Leave it out, or give less to use a part of each node."
            )
        if hbm is not None and hbm > machine.hbm_bytes:
            raise UserError(
                f"--hbm {args.hbm} is more than a GPU of --machine {args.machine} has, "
                f"{show_bytes(machine.hbm_bytes)}. Leave it out, or give less to keep some free."
            )
    hardware = {"gpus_per_node": gpus, "hbm_bytes": hbm, "kernels": args.kernels}
    return hardware, dataclasses.replace(machine, gpus_per_node=gpus)


def _run(args: Namespace) -> int:
    """Print the plan of a recipe in a layout, as tables or JSON, or write it as a web page.

    Returns:
        0, or 2 if the layout is illegal: then its violations and the nearest legal layouts are
        printed, on standard error, or with ``--json`` as a document on standard output.

    Raises:
        UserError: a recipe, setting or option that cannot be read.
    """
    from nemo_megacpp.contract.layout_plan import make_plan, plan_document, refusal_document
    from nemo_megacpp.contract.plan_page import html_report
    from nemo_megacpp.contract.plan_tables import print_plan
    from nemo_megacpp.layout import (
        check_layout,
        describe_nearest,
        describe_violations,
        nearest_in_any_world,
    )
    from nemo_megacpp.preflight.model_checks import validate_model
    from nemo_megacpp.recipes.views import job_of, shape_of, validate_countable
    from nemo_megacpp.render import make_console

    _check_fsdp_options(args)
    hardware, machine = read_hardware(args)
    recipe = read_recipe(args)
    validate_countable(recipe)
    print_assumed(recipe)
    layout, shape, gpus = recipe.layout, shape_of(recipe), hardware["gpus_per_node"]
    violations = check_layout(layout, shape, gpus_per_node=gpus)
    if violations:
        nearest = nearest_in_any_world(layout, shape, gpus_per_node=gpus)
        if args.json:
            print_json(refusal_document(layout, violations, nearest))
        else:
            why = describe_violations(layout, shape, violations)
            near = describe_nearest(layout, nearest)
            print(f"nemo-megacpp: {why}\n{near}", file=sys.stderr)
        return 2
    validate_model(recipe)
    if args.use_megatron_fsdp:
        return _print_fsdp(args, job_of(recipe, **hardware))
    plan = make_plan(job_of(recipe, **hardware), machine)
    _check_narrowing(plan, args.family, args.stage)
    if args.html is not None:
        Path(args.html).write_text(html_report(plan), encoding="utf-8")
    if args.json:
        print_json(plan_document(plan))
        return 0
    console = make_console(_WIDTH)
    print_plan(console, plan, args.family, args.stage)
    if args.html is not None:
        console.print(f"\nwritten: {args.html}")
    return 0


def _check_fsdp_options(args: Namespace) -> None:
    """Refuse options that say nothing of FSDP with it, and its own without it."""
    from nemo_megacpp.core.fsdp import STRATEGIES

    strategy = args.data_parallel_sharding_strategy
    if not args.use_megatron_fsdp:
        if strategy is not None:
            raise UserError(
                f"--data-parallel-sharding-strategy {strategy} has no effect without "
                f"--use-megatron-fsdp. Add that, or leave it out."
            )
        return
    if strategy is not None and strategy not in STRATEGIES:
        raise UserError(
            f"--data-parallel-sharding-strategy {strategy}: legal are {', '.join(STRATEGIES)}."
        )
    unread = [name for name in ("family", "stage", "html") if getattr(args, name) is not None]
    if unread:
        raise UserError(
            f"--use-megatron-fsdp shows the memory of a rank only. Leave out "
            f"{', '.join(f'--{name}' for name in unread)}."
        )


def _print_fsdp(args: Namespace, job: Job) -> int:
    """Print what Megatron's FSDP keeps of a legal job on a rank.

    Raises:
        UserError: FSDP is refused with the model or its layout.
    """
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig

    from nemo_megacpp.contract.fsdp_memory import largest_fsdp_memory
    from nemo_megacpp.contract.fsdp_tables import NOT_COUNTED, fsdp_document, fsdp_table
    from nemo_megacpp.contract.layout_plan import make_plan
    from nemo_megacpp.contract.plan_tables import layout_line, run_line
    from nemo_megacpp.core.fsdp import STRATEGIES, problem_with_fsdp
    from nemo_megacpp.errors import raise_violations
    from nemo_megacpp.render import make_console, print_table
    from nemo_megacpp.settings.fsdp import fsdp_violations

    problem = problem_with_fsdp()
    if problem is not None:
        raise UserError(f"--use-megatron-fsdp: {problem}. Leave it out.")
    job = dataclasses.replace(job, use_distributed_optimizer=True)
    asked = args.data_parallel_sharding_strategy
    strategies = STRATEGIES if asked is None else (asked,)
    wrapper = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=strategies[0],
        use_distributed_optimizer=True,
    )
    # As a bf16 script must ask for it (docs/fsdp.md); Megatron-Core 0.16 has no such field.
    vars(wrapper)["megatron_fsdp_main_grads_dtype"] = torch.float32
    raise_violations(fsdp_violations(job.config(), wrapper))
    plan = make_plan(job)
    kept = {strategy: largest_fsdp_memory(job, strategy) for strategy in strategies}
    if args.json:
        print_json(fsdp_document(plan, kept))
        return 0
    console = make_console(_WIDTH)
    console.print(f"{layout_line(plan)}\n{run_line(plan)}\n", highlight=False, markup=False)
    print_table(console, fsdp_table(plan, kept))
    console.print(NOT_COUNTED, highlight=False, markup=False)
    return 0


def print_assumed(recipe: Recipe) -> None:
    """Print which defaults were taken, on standard error, where the user left the model open."""
    if recipe.assumed:
        print(f"defaults taken: {'; '.join(recipe.assumed)}", file=sys.stderr)


def _check_narrowing(plan: Plan, family: str | None, stage: int | None) -> None:
    if family is not None and family not in plan.activations:
        raise UserError(f"--family {family}: the model has {', '.join(plan.activations)}.")
    if stage is not None and not 0 <= stage < len(plan.stages):
        raise UserError(f"--stage {stage}: the stages are 0 to {len(plan.stages) - 1}.")
