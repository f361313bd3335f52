"""``nemo-megacpp ladder``: bring a recipe up to long sequences, one change at a time."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import add_recipe, print_json, read_count, read_recipe
from nemo_megacpp.commands.verify import differences_from
from nemo_megacpp.nemo.versions import require_nemo

if TYPE_CHECKING:
    from nemo_megacpp.recipes.recipe import Recipe
    from nemo_megacpp.runtime.workers import WorkerPool

_WIDTH = 130
"""Columns of the table."""
_MOST_TOKENS = 2**20
_MOST_DOUBLINGS = 12


def add_parser(commands: Any) -> None:
    """Add ``ladder`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "ladder",
        help="bring a recipe up to long sequences, one change at a time",
        description="On a small model of the recipe's proportions: double the sequence, then add "
        "TP, SP, CP, packs and recompute, one rung at a time. Each rung shows whether its numbers "
        "are those of one rank, its peak memory and its speed. Stops at the first that fails.",
    )
    add_recipe(parser)
    parser.add_argument(
        "--start", metavar="TOKENS", help="tokens of the first rung; default: 64, or what divides"
    )
    parser.add_argument(
        "--doublings", default="2", metavar="N", help="how often the sequence doubles; default: 2"
    )
    parser.add_argument(
        "--ranks", metavar="N", help="most ranks that a rung may start; default: 16"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    from nemo_megacpp.proof.verification import MAX_RANKS

    ranks = MAX_RANKS if args.ranks is None else read_count("--ranks", args.ranks, MAX_RANKS)
    start = None if args.start is None else read_count("--start", args.start, _MOST_TOKENS)
    doublings = read_count("--doublings", args.doublings, _MOST_DOUBLINGS)
    return climb_recipe(read_recipe(args), ranks, start, doublings, args.json)


def climb_recipe(
    recipe: Recipe,
    ranks: int,
    start: int | None,
    doublings: int,
    as_json: bool,
    pool: WorkerPool | None = None,
) -> int:
    """Climb the ladder of a recipe and print a table, or JSON, of its rungs.

    Args:
        recipe: resolved.
        ranks: most ranks of a rung.
        start: tokens of the first rung; None: chosen.
        doublings: how often the sequence doubles.
        as_json: print one JSON document instead of a table
            (:func:`nemo_megacpp.proof.ladder_report.ladder_document`).
        pool: ranks to run on; this machine's, as many as the ladder needs, if not given.

    Returns:
        0 if every rung gives the numbers of one rank, 1 if one does not or cannot run.

    Raises:
        UserError: for a recipe or layout that is illegal, or a first sequence that does not divide.
    """
    from nemo_megacpp.preflight.model_checks import validate_model, validate_recipe_layout
    from nemo_megacpp.proof.case_report import RANKS_ON
    from nemo_megacpp.proof.ladder import ROWS, build_ladder, climb
    from nemo_megacpp.proof.ladder_report import ladder_document, print_ladder
    from nemo_megacpp.recipes.views import shape_of
    from nemo_megacpp.render import make_console
    from nemo_megacpp.runtime.workers import WorkerPool, device_for

    validate_recipe_layout(recipe)
    config = validate_model(recipe)
    model = {**recipe.model, "m2rnn_num_heads": config.m2rnn_num_heads}
    batch = dataclasses.replace(recipe.training, micro_batch_size=1, global_batch_size=ROWS)

    def shape(fields: Mapping[str, Any]) -> Any:
        return shape_of(dataclasses.replace(recipe, model=dict(fields), training=batch))

    world = max(recipe.layout.tp, 2) * max(recipe.layout.cp, 2)
    device = device_for(min(world, ranks)) if pool is None else pool.device
    ladder = build_ladder(model, recipe.layout, shape, device, ranks, start, doublings)
    console = make_console(_WIDTH, stderr=as_json)
    console.print(
        f"{recipe.name}: {len(ladder.rungs)} rungs on a proxy model of its proportions; "
        f"{RANKS_ON[device]}",
        soft_wrap=True,
    )
    for line in differences_from(recipe):
        console.print(line)
    if recipe.layout.ep > 1 or recipe.layout.pp > 1:
        console.print("EP and PP stay 1: they are no axes of the sequence ('verify' proves them)")
    training = {
        "use_distributed_optimizer": recipe.training.use_distributed_optimizer,
        "ddp": {
            "overlap_grad_reduce": recipe.training.overlap_grad_reduce,
            "overlap_param_gather": recipe.training.gathers_in_forward,
        },
    }
    precision: Any = "float32" if recipe.training.precision == "fp32" else "bfloat16"
    require_nemo()
    from nemo_megacpp.nemo.proof_run import NEMO, measure_steps  # once all is valid: NeMo

    say = lambda line: console.print(f"  {line}")  # noqa: E731
    with ExitStack() as stack:
        if pool is None:
            world = max(rung.layout.world for rung in ladder.rungs)
            pool = stack.enter_context(WorkerPool(world, device=device))
        rungs = climb(ladder.rungs, shape, NEMO, measure_steps, pool, precision, training, say)
        results = list(rungs)
    if as_json:
        print_json(ladder_document(recipe.name, precision, device, ladder, results))
    else:
        print_ladder(console, ladder, results)
    return 0 if all(result.passed for result in results) else 1
