"""``nemo-megacpp compare``: one axis at a time, in two recipes or two finished runs.

The document of ``--json``, version 1::

    schema: 1
    a, b: {name, kind: "recipe" or "run", recipe, layout, world_size}
    moved: [axis]
    differences: [{axis, setting, a, b}]
    conclusion: "one axis moved", "several axes moved" or "no axis moved"
    contract: {memory: [PAIR], sent: [PAIR], added: [text], dropped: [text]}, sizes in bytes; null
        unless one axis moved
    runs: {steps, first_step, first_loss_difference, last_step, largest_loss_difference, at_step,
        mean_loss_difference, loss: PAIR, heldout_loss: PAIR, heldout_step,
        seconds_per_step: PAIR, tokens_per_second: PAIR}; null
        unless both are runs and at most one axis moved
    notes: [text], what else the runs' numbers depend on

where PAIR is ``{name, a, b, ratio}``, the ratio being b / a, or null.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_megacpp.contract.plan import make_plan
from nemo_megacpp.errors import UserError
from nemo_megacpp.preflight.model_checks import validate_model, validate_recipe_layout
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.recipes.recipe_differences import SettingDifference, differences, moved_axes
from nemo_megacpp.recipes.views import job_of, validate_countable
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runs.effects import (
    ContractEffect,
    Pair,
    RunsEffect,
    contract_effect,
    runs_effect,
)
from nemo_megacpp.runs.run_folder import METRICS_FILE, RECIPE_FILE

SCHEMA = 1
_DRAW_WEIGHTS = {"TP", "EP", "ETP", "PP", "VPP"}
"""Axes on which ranks hold different weights: Megatron seeds their generators apart."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: as the user gave it.
        recipe: resolved.
        curve: what it recorded, if it is a run.
    """

    name: str
    recipe: Recipe
    curve: Curve | None = None


@dataclass(frozen=True)
class Comparison:
    """What differs, and what that did.

    Attributes:
        a, b: the two sides.
        differences: by axis.
        contract: None unless exactly one axis moved.
        runs: None unless both sides are runs and at most one axis moved. If none did, it is the
            spread of one recipe from run to run.
    """

    a: Side
    b: Side
    differences: tuple[SettingDifference, ...]
    contract: ContractEffect | None
    runs: RunsEffect | None

    @property
    def moved(self) -> list[str]:
        """The axes that moved."""
        return moved_axes(list(self.differences))

    @property
    def notes(self) -> tuple[str, ...]:
        """What else the numbers of two runs depend on."""
        if self.runs is None:
            return ()
        found = []
        a, b = self.a.recipe, self.b.recipe
        if set(self.moved) & _DRAW_WEIGHTS and a.resume is None and b.resume is None:
            found.append(
                f"Both runs drew their own initial weights, rank by rank, and those depend on "
                f"{self.moved[0]}: the losses differ as those of two seeds do. Start both from one "
                f"checkpoint (resume=…) to see what the layout does to them."
            )
        one, two = (recipe.training.limit_val_batches for recipe in (a, b))
        if one != two:
            found.append(f"Held-out loss is over {one} batches in A, and over {two} in B.")
        return tuple(found)


def compare_sides(a: Side, b: Side, **hardware: Any) -> Comparison:
    """Compare two sides whose layouts are legal; ``hardware`` are further fields of a `Job`."""
    found = differences(a.recipe, b.recipe)
    moved = moved_axes(found)
    contract = runs = None
    if len(moved) == 1:
        plans = [make_plan(job_of(side.recipe, **hardware)) for side in (a, b)]
        contract = contract_effect(*plans)
    if len(moved) <= 1 and a.curve is not None and b.curve is not None:
        runs = runs_effect(a.curve, b.curve)
    return Comparison(a, b, tuple(found), contract, runs)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Return ``comparison`` as plain data."""
    contract, runs = comparison.contract, comparison.runs
    number = {0: "no axis", 1: "one axis"}.get(len(comparison.moved), "several axes")
    return {
        "schema": SCHEMA,
        "a": _plain_side(comparison.a),
        "b": _plain_side(comparison.b),
        "moved": comparison.moved,
        "differences": [dataclasses.asdict(item) for item in comparison.differences],
        "conclusion": f"{number} moved",
        "contract": contract
        and {
            "memory": [_plain_pair(pair) for pair in contract.memory],
            "sent": [_plain_pair(pair) for pair in contract.sent],
            "added": list(contract.added),
            "dropped": list(contract.dropped),
        },
        "runs": runs
        and {
            "steps": runs.steps,
            "first_step": runs.first_step,
            "first_loss_difference": runs.first,
            "last_step": runs.last_step,
            "largest_loss_difference": runs.largest,
            "at_step": runs.at_step,
            "mean_loss_difference": runs.mean,
            "loss": _plain_pair(runs.loss),
            "heldout_loss": _plain_pair(runs.heldout),
            "heldout_step": runs.heldout_step,
            "seconds_per_step": _plain_pair(runs.seconds),
            "tokens_per_second": _plain_pair(runs.tokens_per_second),
        },
        "notes": list(comparison.notes),
    }


def read_side(letter: str, source: str, overrides: Iterable[str], world: str | None) -> Side:
    """Resolve one side: a recipe, or the folder of a run.

    Args:
        letter: ``A`` or ``B``, for messages.
        source: a recipe's name, a YAML file, or a run folder.
        overrides: ``key=value`` settings of a recipe.
        world: of ``--world-size``.

    Raises:
        UserError: neither of them, an illegal layout, or settings for a run.
    """
    folder = Path(source)
    if source in CATALOG or not folder.is_dir():
        recipe, curve = resolve(source, overrides, world_size=world), None
        validate_countable(recipe)
    else:
        if overrides or world is not None:
            raise UserError(f"{letter} is a run, {folder}: its recipe cannot be changed any more.")
        recipe, curve = _read_run(folder)
    try:
        validate_recipe_layout(recipe)
        validate_model(recipe)
    except UserError as error:
        raise UserError(f"{letter}, {source}: {error}") from None
    return Side(source, recipe, curve)


def _read_run(folder: Path) -> tuple[Recipe, Curve]:
    for name in (RECIPE_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no folder of a finished run: it has no {name}.")
    recipe = resolve(str(folder / RECIPE_FILE))
    try:
        curve = read_curve(folder)
        losses = curve.losses
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / METRICS_FILE} cannot be read: {error!r}.") from None
    if not losses:
        raise UserError(f"{folder} is no folder of a finished run: it recorded no step.")
    return recipe, curve


def _plain_side(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "kind": "recipe" if side.curve is None else "run",
        "recipe": side.recipe.name,
        "layout": side.recipe.layout.short(),
        "world_size": side.recipe.layout.world,
    }


def _plain_pair(pair: Pair) -> dict[str, Any]:
    return {**pair._asdict(), "ratio": pair.ratio}
