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
    read_gpu_memory,
    read_recipe,
)
from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from nemo_megacpp.contract.plan import Plan
    from nemo_megacpp.layout import ParallelLayout
    from nemo_megacpp.recipes.recipe import Recipe

_WIDTH = 150
"""Columns of the tables."""


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "plan",
        help="what a layout splits, sends, holds and costs, before the run",
        description="Say what a recipe's layout means: legality, who owns what, every collective, "
        "the memory of each stage, and what the layout costs. Needs no GPU.",
    )
    add_recipe(parser)
    parser.add_argument("--world-size", metavar="N", help="ranks; default: the recipe's world_size")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--hbm", metavar="141GB", help="memory of a GPU, to compare with")
    parser.add_argument(
        "--kernels",
        choices=("gpu", "torch"),
        default="gpu",
        help="whose activations: Transformer Engine's and mamba_ssm's, or plain torch's",
    )
    parser.add_argument("--family", metavar="A", help="one family in detail (also embedding, head)")
    parser.add_argument("--stage", type=int, metavar="0", help="one pipeline stage in detail")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", metavar="FILE", help="also write a self-contained web page")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    """Print the plan of a recipe in a layout, as tables or JSON, or write it as a web page.

    Returns:
        0, or 2 if the layout is illegal: then its violations and the nearest legal layouts are
        printed, on standard error, or with ``--json`` as a document on standard output.

    Raises:
        UserError: a recipe, setting or option that cannot be read.
    """
    from nemo_megacpp.contract.document import plan_document, refusal_document
    from nemo_megacpp.contract.page import html_report
    from nemo_megacpp.contract.plan import make_plan
    from nemo_megacpp.contract.show import print_plan
    from nemo_megacpp.layout import check_layout
    from nemo_megacpp.preflight.model_checks import validate_model
    from nemo_megacpp.recipes.views import job_of, shape_of, validate_countable
    from nemo_megacpp.render import make_console

    hbm = None if args.hbm is None else read_gpu_memory(args.hbm)
    recipe = read_recipe(args)
    validate_countable(recipe)
    say_assumed(recipe)
    if args.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node {args.gpus_per_node} must be at least 1.")
    shape = shape_of(recipe)
    violations = check_layout(recipe.layout, shape, gpus_per_node=args.gpus_per_node)
    if violations:
        nearest = _nearest(recipe.layout, shape, args.gpus_per_node)
        document = refusal_document(recipe.layout, violations, nearest)
        if args.json:
            print_json(document)
        else:
            print(_refusal(document), file=sys.stderr)
        return 2
    validate_model(recipe)
    job = job_of(recipe, gpus_per_node=args.gpus_per_node, hbm_bytes=hbm, kernels=args.kernels)
    plan = make_plan(job)
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


def say_assumed(recipe: Recipe) -> None:
    """Say on standard error which model was assumed, where the user left that open."""
    if recipe.assumed:
        print(f"defaults taken: {'; '.join(recipe.assumed)}", file=sys.stderr)


def _nearest(layout: ParallelLayout, shape: Any, gpus_per_node: int) -> list[ParallelLayout]:
    """Return legal layouts of the world asked for, or of another one if it has none."""
    from nemo_megacpp.layout import nearest_legal

    # A degree that is none has no neighbours.
    if any(degree < 1 for degree in (layout.world, layout.minimal_world_size)):
        return []
    here = nearest_legal(layout, shape, gpus_per_node=gpus_per_node)
    anywhere = dataclasses.replace(layout, world_size=None)
    return here or nearest_legal(anywhere, shape, gpus_per_node=gpus_per_node)


def _refusal(document: dict[str, Any]) -> str:
    from nemo_megacpp.layout import ParallelLayout

    lines = [f"nemo-megacpp: layout {document['layout']} is illegal:"]
    for number, item in enumerate(document["violations"], start=1):
        legal = f" Legal: {' or '.join(item['legal'])}." if item["legal"] else ""
        lines.append(f"  {number}. [{item['axis']}] {item['message']}{legal}")
    nearest = document["nearest"]
    asked = ParallelLayout.parse(document["layout"]).world_size
    elsewhere = nearest and asked != ParallelLayout.parse(nearest[0]).world_size
    where = " in a world of another size" if elsewhere else ""
    lines.append(
        f"Nearest legal layouts{where}: {'; '.join(nearest)}."
        if nearest
        else "No layout near this one is legal."
    )
    return "\n".join(lines)


def _check_narrowing(plan: Plan, family: str | None, stage: int | None) -> None:
    if family is not None and family not in plan.activations:
        raise UserError(f"--family {family}: the model has {', '.join(plan.activations)}.")
    if stage is not None and not 0 <= stage < len(plan.stages):
        raise UserError(f"--stage {stage}: the stages are 0 to {len(plan.stages) - 1}.")
