"""``nemo-megacpp verify``: a recipe's layout, proved on a small model of its proportions."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import add_recipe, print_json, read_recipe

if TYPE_CHECKING:
    from nemo_megacpp.proof.bench import TrainingPath
    from nemo_megacpp.recipes.recipe import Recipe
    from nemo_megacpp.runtime.workers import WorkerPool

_ROWS = 2
"""Most rows of a microbatch of the proof; what several rows may get wrong, two show."""
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
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    return verify_recipe(read_recipe(args), args.json)


def verify_recipe(recipe: Recipe, as_json: bool, pool: WorkerPool | None = None) -> int:
    """Prove the layout of a recipe and print a table, or JSON, of the differences.

    Args:
        recipe: resolved.
        as_json: print one JSON document instead of a table
            (:func:`nemo_megacpp.proof.show.proof_document`).
        pool: ranks to run on; this machine's, as many as the layout needs, if not given.

    Returns:
        0 if all checks passed, 1 if a layout changes one.

    Raises:
        UserError: for a recipe or layout that is illegal.
    """
    from nemo_megacpp.config import HybridConfig
    from nemo_megacpp.layout import validate_layout
    from nemo_megacpp.preflight.model_checks import validate_model
    from nemo_megacpp.proof.show import RANKS_ON, print_trials, proof_document
    from nemo_megacpp.proof.verify import verify
    from nemo_megacpp.recipes.views import shape_of
    from nemo_megacpp.render import make_console
    from nemo_megacpp.runtime.workers import device_for

    size = min(recipe.training.micro_batch_size, _ROWS)

    def shape(small: Any) -> Any:
        rows = 2 * size * recipe.layout.pp * recipe.layout.data_parallel_size
        training = dataclasses.replace(
            recipe.training, micro_batch_size=size, global_batch_size=rows
        )
        return shape_of(_with(recipe, dict(small), training))

    if recipe.model.get("m2rnn_num_heads") is not None:
        # Before Megatron's checks of the model, which end at the first thing wrong with a layout.
        validate_layout(recipe.layout, shape(recipe.model))
    validate_model(recipe)
    model = {**recipe.model}
    if model.get("m2rnn_num_heads") is None:
        model["m2rnn_num_heads"] = HybridConfig(**recipe.model).m2rnn_num_heads

    device = device_for(recipe.layout.world) if pool is None else pool.device
    console = make_console(_WIDTH, stderr=as_json)
    console.print(
        f"{recipe.name}: {recipe.layout.describe()}, on a proxy model of its proportions; "
        f"{RANKS_ON[device]}",
        soft_wrap=True,
    )
    for line in _left_out(recipe):
        console.print(line)
    training = {
        "micro_batch_size": size,
        "loss_mask": "uneven",
        "packed": recipe.training.packed_documents,
        "use_distributed_optimizer": recipe.training.use_distributed_optimizer,
    }
    say = lambda line: console.print(f"  {line}")  # noqa: E731
    trials = list(verify(model, recipe.layout, shape, _path(), training, say, pool))
    answer = proof_document(recipe.name, recipe.layout, device, trials)
    if as_json:
        print_json(answer)
    else:
        print_trials(console, trials)
    return 0 if answer["holds"] else 1


def _left_out(recipe: Recipe) -> list[str]:
    """Return what of the recipe is not part of the proof."""
    from nemo_megacpp.proof.proxy_model import DRAWN

    drawn = [
        f"{name}={value}" for name, value in recipe.model.items() if value != DRAWN.get(name, value)
    ]
    lines = [f"defaults taken: {'; '.join(recipe.assumed)}"] if recipe.assumed else []
    if drawn:
        lines.append(f"without {', '.join(drawn)}: each rank draws random numbers of its own")
    return lines


def _path() -> TrainingPath:
    """Return what trains; importing NeMo takes seconds."""
    from nemo_megacpp.nemo.proof_run import NEMO

    return NEMO


def _with(recipe: Recipe, model: dict[str, Any], training: Any) -> Recipe:
    return dataclasses.replace(recipe, model=model, training=training)
