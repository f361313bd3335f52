"""``nemo-megacpp verify``: prove a recipe's layout on a small model of its proportions."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import add_recipe, print_json, read_recipe

if TYPE_CHECKING:
    from nemo_megacpp.recipes.recipe import Recipe
    from nemo_megacpp.runtime.workers import WorkerPool

_ROWS = 2
"""Most rows of a microbatch: two show what several rows may get wrong."""
_WIDTH = 130
"""Columns of the table."""


def add_parser(commands: Any) -> None:
    """Add ``verify`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "verify",
        help="prove that a layout does not change a recipe's numbers",
        description="Compare a layout with one rank, on a small model of the recipe's proportions: "
        "loss, gradients, step and checkpoint, axis by axis and family by family.",
    )
    add_recipe(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda args: verify_recipe(read_recipe(args), args.json))


def verify_recipe(recipe: Recipe, as_json: bool, pool: WorkerPool | None = None) -> int:
    """Prove the layout of a recipe and print a table, or JSON, of the differences.

    Args:
        recipe: resolved.
        as_json: print one JSON document instead of a table
            (:func:`nemo_megacpp.proof.case_report.verify_document`).
        pool: ranks to run on; this machine's, as many as the layout needs, if not given.

    Returns:
        0 if all checks passed, 1 if a layout changes one.

    Raises:
        UserError: for a recipe or layout that is illegal.
    """
    from nemo_megacpp.layout import validate_layout
    from nemo_megacpp.preflight.model_checks import validate_model
    from nemo_megacpp.proof.case_report import RANKS_ON, print_cases, verify_document
    from nemo_megacpp.proof.verification import verify_layout
    from nemo_megacpp.recipes.views import differences_from, shape_of
    from nemo_megacpp.render import make_console
    from nemo_megacpp.runtime.workers import device_for

    size = min(recipe.training.micro_batch_size, _ROWS)
    rows = 2 * size * recipe.layout.pp * recipe.layout.data_parallel_size
    batch = dataclasses.replace(recipe.training, micro_batch_size=size, global_batch_size=rows)

    def shape(model: Mapping[str, Any]) -> Any:
        return shape_of(dataclasses.replace(recipe, model=dict(model), training=batch))

    if recipe.model.get("m2rnn_num_heads") is not None:
        # Before Megatron's checks of the model, which end at the first thing wrong with a layout.
        validate_layout(recipe.layout, shape(recipe.model))
    config = validate_model(recipe)
    model = {**recipe.model, "m2rnn_num_heads": config.m2rnn_num_heads}

    device = device_for(recipe.layout.world) if pool is None else pool.device
    console = make_console(_WIDTH, stderr=as_json)
    console.print(
        f"{recipe.name}: {recipe.layout.describe()}, on a proxy model of its proportions; "
        f"{RANKS_ON[device]}",
        soft_wrap=True,
    )
    for line in differences_from(recipe):
        console.print(line)
    training = {
        "micro_batch_size": size,
        "loss_mask": "uneven",
        "packed": recipe.training.packed_documents,
        "use_distributed_optimizer": recipe.training.use_distributed_optimizer,
        "ddp": {
            "overlap_grad_reduce": recipe.training.overlap_grad_reduce,
            "overlap_param_gather": recipe.training.gathers_in_forward,
        },
    }
    say = lambda line: console.print(f"  {line}")  # noqa: E731
    from nemo_megacpp.nemo.proof_run import NEMO  # once all is valid: it imports NeMo

    cases = list(verify_layout(model, recipe.layout, shape, NEMO, training, say, pool))
    if as_json:
        print_json(verify_document(recipe.name, recipe.layout, device, cases))
    else:
        print_cases(console, cases)
    return 0 if all(case.passed for case in cases) else 1
