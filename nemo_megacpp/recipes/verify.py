"""``nemo-megacpp verify``: a recipe's layout, proved on a small model of its proportions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import refuse_illegal
from nemo_megacpp.proof.bench import TrainingPath
from nemo_megacpp.proof.canary import DRAWN
from nemo_megacpp.proof.verify import verify
from nemo_megacpp.recipes.check import check_model_of, shape_of
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.recipes.verify_report import RANKS_ON, document, print_table
from nemo_megacpp.runtime.workers import WorkerPool, device_for

_ROWS = 2
"""Most rows of a microbatch of the proof; what several rows may get wrong, two show."""
_WIDTH = 130
"""Columns of the table; a narrower terminal wraps its lines rather than lose numbers."""


def verify_recipe(
    source: str,
    layout: str | None,
    overrides: Iterable[str],
    as_json: bool,
    pool: WorkerPool | None = None,
) -> int:
    """Prove the layout of a recipe and print a table, or JSON, of the differences.

    Args:
        source: a recipe's name or a YAML file.
        layout: of ``--layout``, as for :func:`nemo_megacpp.recipes.recipe.resolve`.
        overrides: ``key=value`` strings.
        as_json: print one JSON document instead of a table
            (:func:`nemo_megacpp.recipes.verify_report.document`).
        pool: ranks to run on; this machine's, as many as the layout needs, if not given.

    Returns:
        0 if every number agrees, 1 if a layout changes one.

    Raises:
        UserError: for a recipe or layout that is illegal.
    """
    recipe = resolve(source, overrides, layout)

    size = min(recipe.training.micro_batch_size, _ROWS)

    def shape(small: Any) -> Any:
        rows = 2 * size * recipe.layout.pp * recipe.layout.data_parallel_size
        training = dataclasses.replace(
            recipe.training, micro_batch_size=size, global_batch_size=rows
        )
        return shape_of(_with(recipe, dict(small), training))

    if recipe.model.get("m2rnn_num_heads") is not None:
        # Before Megatron's checks of the model, which end at the first thing wrong with a layout.
        refuse_illegal(recipe.layout, shape(recipe.model))
    check_model_of(recipe)
    model = {**recipe.model}
    if model.get("m2rnn_num_heads") is None:
        model["m2rnn_num_heads"] = HybridConfig(**recipe.model).m2rnn_num_heads

    device = device_for(recipe.layout.world) if pool is None else pool.device
    console = Console(stderr=as_json, highlight=False)
    console.width = max(console.width, _WIDTH)
    console.print(
        f"{recipe.name}: {recipe.layout.describe()}, on a canary of its proportions; "
        f"{RANKS_ON[device]}"
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
    answer = document(recipe.name, recipe.layout, device, trials)
    if as_json:
        print(json.dumps(answer, indent=1, allow_nan=False))
    else:
        print_table(console, trials)
    return 0 if answer["holds"] else 1


def _left_out(recipe: Recipe) -> list[str]:
    """Return what of the recipe is not part of the proof."""
    drawn = [
        f"{name}={value}" for name, value in recipe.model.items() if value != DRAWN.get(name, value)
    ]
    lines = [f"defaults taken: {'; '.join(recipe.assumed)}"] if recipe.assumed else []
    if drawn:
        lines.append(f"without {', '.join(drawn)}: each rank draws random numbers of its own")
    return lines


def _path() -> TrainingPath:
    """Return what trains; importing NeMo takes seconds."""
    from nemo_megacpp.recipes.nemo.proof_run import NEMO

    return NEMO


def _with(recipe: Recipe, model: dict[str, Any], training: Any) -> Recipe:
    return dataclasses.replace(recipe, model=model, training=training)
