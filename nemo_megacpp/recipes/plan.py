"""``nemo-megacpp plan``: what a recipe's layout means, before it runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console

from nemo_megacpp.contract.document import plan_document, refusal_document
from nemo_megacpp.contract.job import Job
from nemo_megacpp.contract.plan import Plan, make_plan
from nemo_megacpp.contract.report_html import html_report
from nemo_megacpp.contract.report_text import print_plan
from nemo_megacpp.contract.units import read_gpu_memory
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout, check_layout, nearest_legal
from nemo_megacpp.recipes.check import check_model_of, shape_of
from nemo_megacpp.recipes.command_line import MAX_RANKS, read_recipe
from nemo_megacpp.recipes.recipe import Recipe

_WIDTH = 150
"""Columns of the tables; a narrower terminal wraps their lines rather than lose numbers."""


def plan_recipe(args: Namespace) -> int:
    """Print the plan of a recipe in a layout, as tables or JSON, or write it as a web page.

    Returns:
        0, or 2 if the layout is illegal: then its violations and the nearest legal layouts are
        printed, on standard error, or with ``--json`` as a document on standard output.

    Raises:
        UserError: a recipe, setting or option that cannot be read.
    """
    hbm = None if args.hbm is None else read_gpu_memory(args.hbm)
    recipe = read_recipe(args)
    refuse_uncountable(recipe)
    say_assumed(recipe)
    if args.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node {args.gpus_per_node} must be at least 1.")
    shape = shape_of(recipe)
    violations = check_layout(recipe.layout, shape, gpus_per_node=args.gpus_per_node)
    if violations:
        nearest = _nearest(recipe.layout, shape, args.gpus_per_node)
        document = refusal_document(recipe.layout, violations, nearest)
        if args.json:
            print(json.dumps(document, indent=1))
        else:
            print(_refusal(document), file=sys.stderr)
        return 2
    check_model_of(recipe)
    job = job_of(recipe, gpus_per_node=args.gpus_per_node, hbm_bytes=hbm, kernels=args.kernels)
    plan = make_plan(job)
    _check_narrowing(plan, args.family, args.stage)
    if args.html is not None:
        Path(args.html).write_text(html_report(plan), encoding="utf-8")
    if args.json:
        print(json.dumps(plan_document(plan), indent=1))
        return 0
    console = Console()
    if not console.is_terminal or console.width < _WIDTH:
        console = Console(width=_WIDTH)
    print_plan(console, plan, args.family, args.stage)
    if args.html is not None:
        console.print(f"\nwritten: {args.html}")
    return 0


def say_assumed(recipe: Recipe) -> None:
    """Say on standard error which model was assumed, where the user left that open."""
    if recipe.assumed:
        print(f"defaults taken: {'; '.join(recipe.assumed)}", file=sys.stderr)


def refuse_uncountable(recipe: Recipe) -> None:
    """Refuse a world that no plan can count out.

    Raises:
        UserError: with the limits.
    """
    layout = recipe.layout
    ranks = layout.world_size if layout.world_size is not None else layout.minimal_world_size
    if not 0 < ranks <= MAX_RANKS:
        raise UserError(
            f"A world of {ranks:,} ranks cannot be planned: it must have between 1 and "
            f"{MAX_RANKS:,} ranks."
        )


def job_of(recipe: Recipe, **hardware: Any) -> Job:
    """Return the contract's view of ``recipe``; ``hardware`` are further fields of a `Job`."""
    training = recipe.training
    return Job(
        recipe.model,
        recipe.layout,
        training.micro_batch_size,
        training.global_batch_size,
        "fp32" if training.precision == "fp32" else "bf16",
        training.use_distributed_optimizer,
        name=recipe.name,
        **hardware,
    )


def _nearest(layout: ParallelLayout, shape: Any, gpus_per_node: int) -> list[ParallelLayout]:
    """Return legal layouts of the world asked for, or of another one if it has none."""
    # A degree that is none has no neighbours.
    if any(degree < 1 for degree in (layout.world, layout.minimal_world_size)):
        return []
    here = nearest_legal(layout, shape, gpus_per_node=gpus_per_node)
    anywhere = dataclasses.replace(layout, world_size=None)
    return here or nearest_legal(anywhere, shape, gpus_per_node=gpus_per_node)


def _refusal(document: dict[str, Any]) -> str:
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
