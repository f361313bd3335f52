"""``nemo-megacpp gathers``: every gather and all-to-all of a layout, and what it is for."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import add_recipe, print_json, read_recipe
from nemo_megacpp.nemo.versions import require_nemo

if TYPE_CHECKING:
    from nemo_megacpp.recipes.recipe import Recipe
    from nemo_megacpp.runtime.workers import WorkerPool

_WIDTH = 156
"""Columns of the table."""


def add_parser(commands: Any) -> None:
    """Add ``gathers`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "gathers",
        help="show every gather of a layout, and whether the next operator undoes it",
        description="Run one step of a small model of the recipe's proportions, on CPU ranks, and "
        "list every gather and all-to-all of the depth: the module that asked for it, bytes, how "
        "long the tensor lives, and the operator that needs it. Exit code 1 if a gathered tensor "
        "is cut back before any operator uses another rank's share.",
    )
    add_recipe(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda args: inspect_recipe(read_recipe(args), args.json))


def inspect_recipe(recipe: Recipe, as_json: bool, pool: WorkerPool | None = None) -> int:
    """Record the gathers of a recipe's layout and print a table, or JSON, of them.

    Args:
        recipe: resolved.
        as_json: print one JSON document instead of a table
            (:func:`nemo_megacpp.proof.gather_report.gathers_document`).
        pool: CPU ranks to run on; this machine's, as many as the layout needs, if not given.

    Returns:
        0 if every gather is needed, 1 if one is undone.

    Raises:
        UserError: for a recipe or layout that is illegal.
    """
    from nemo_megacpp.layout import validate_layout
    from nemo_megacpp.preflight.model_checks import validate_model
    from nemo_megacpp.proof.gather_report import gathers_document, print_gathers
    from nemo_megacpp.proof.gather_run import inspect_gathers
    from nemo_megacpp.recipes.views import shape_of
    from nemo_megacpp.render import make_console

    def shape(model: Mapping[str, Any], rows: int) -> Any:
        batch = dataclasses.replace(recipe.training, micro_batch_size=1, global_batch_size=rows)
        return shape_of(dataclasses.replace(recipe, model=dict(model), training=batch))

    rows = recipe.layout.pp * recipe.layout.data_parallel_size
    if recipe.model.get("m2rnn_num_heads") is not None:
        # Before Megatron's checks of the model, which end at the first thing wrong with a layout.
        validate_layout(recipe.layout, shape(recipe.model, rows))
    config = validate_model(recipe)
    model = {**recipe.model, "m2rnn_num_heads": config.m2rnn_num_heads}
    console = make_console(_WIDTH, stderr=as_json)
    console.print(
        f"{recipe.name}: {recipe.layout.describe()}, on a proxy model of its proportions; first "
        "microbatch of a step, ranks on the CPU (gloo)",
        soft_wrap=True,
    )
    require_nemo()
    from nemo_megacpp.nemo.proof_run import record_gathers  # once all is valid: it imports NeMo

    training = {
        "micro_batch_size": recipe.training.micro_batch_size,
        "precision": recipe.training.precision,
        "packed": recipe.training.packed_documents,
    }
    found = inspect_gathers(model, recipe.layout, shape, record_gathers, training, pool)
    if as_json:
        print_json(gathers_document(recipe.name, recipe.layout, found))
    else:
        print_gathers(console, found)
    return 1 if any(row.is_undone for row in found) else 0
