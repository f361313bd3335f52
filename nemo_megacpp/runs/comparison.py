"""Two recipes or two finished runs compared, one axis at a time.

The document of ``nemo-megacpp compare --json``, version 1::

    schema: 1
    a, b: {name, kind: "recipe" or "run", recipe, layout, world_size}
    moved: [axis]
    differences: [{axis, setting, a, b}]
    conclusion: "one axis moved", "several axes moved" or "no axis moved"
    contract: {memory: [PAIR], sent: [PAIR], added: [text], dropped: [text]}, sizes in bytes, with
        the headroom by plan if a GPU's memory is known; null unless one axis moved
    runs: {steps, first_step, first_loss_difference, last_step, largest_loss_difference, at_step,
        mean_loss_difference, loss: PAIR, heldout_loss: PAIR, heldout_step,
        seconds_per_step: PAIR, tokens_per_second: PAIR, memory: [PAIR], first_step_seconds: [PAIR],
        spread_seconds: [PAIR]}, as measured; null unless both are runs and at most one axis moved
    untried: [{layout, legal, reasons: [text], nearest: [layout], memory}], layouts that were asked
        about; memory in bytes of the fullest rank by plan
    notes: [text], what else the runs' numbers depend on

where PAIR is ``{name, a, b, ratio}``, the ratio being b / a, or null.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemo_megacpp.contract.layout_plan import Plan, make_plan
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import (
    check_layout,
    describe_nearest,
    describe_violations,
    nearest_in_any_world,
)
from nemo_megacpp.preflight.model_checks import validate_model
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.recipes.recipe_differences import SettingDifference, differences, moved_axes
from nemo_megacpp.recipes.views import job_of, shape_of, validate_countable
from nemo_megacpp.runs.curves import Curve
from nemo_megacpp.runs.measured import measured
from nemo_megacpp.runs.record import read_run
from nemo_megacpp.runs.run_folder import RECIPE_FILE
from nemo_megacpp.runs.untried import Untried

SCHEMA = 1
_DRAW_WEIGHTS = {"TP", "EP", "ETP", "PP", "VPP"}
"""Axes on which ranks hold different weights: Megatron gives their generators different seeds."""


@dataclass(frozen=True)
class Side:
    """One of the two sides.

    Attributes:
        name: as the user gave it.
        recipe: resolved.
        curve: what it recorded, if it is a run.
    """

    name: str
    recipe: Recipe
    curve: Curve | None = None


class Pair(NamedTuple):
    """A quantity on both sides.

    Attributes:
        name: what it is.
        a, b: its values; None where a side has none.
    """

    name: str
    a: float | None
    b: float | None

    @property
    def ratio(self) -> float | None:
        """``b / a``, where that is a number."""
        return None if not self.a or self.a < 0 or self.b is None else self.b / self.a


@dataclass(frozen=True)
class ContractEffect:
    """What differs between two plans.

    Attributes:
        memory: bytes of each one's fullest rank, by kind, and what a GPU has left if its memory is
            known.
        sent: bytes of a step that all ranks send, by group, in all, and between nodes.
        added, dropped: consequences that only the second, or only the first has.
    """

    memory: tuple[Pair, ...]
    sent: tuple[Pair, ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class RunsEffect:
    """What differs between two runs, over the steps that both recorded with a finite loss.

    Attributes:
        steps: how many there are; first_step and last_step are the ends.
        first_loss_difference: absolute difference of training loss, in nats; that of the initial
            weights, if it is the runs' first step. The largest one is at at_step.
        loss: training loss at the last common step.
        heldout_loss: at the last common evaluation, heldout_step.
        seconds_per_step, tokens_per_second: medians, without each run's first step.
        memory: measured peak of the fullest rank, and what a GPU has left if its memory is known.
        first_step_seconds: of each run's own first step, with the fastest and slowest rank's.
        spread_seconds: what a tenth of the other steps stayed below, and went above.
    """

    steps: int
    first_step: int | None
    first_loss_difference: float | None
    last_step: int | None
    largest_loss_difference: float | None
    at_step: int | None
    mean_loss_difference: float | None
    loss: Pair
    heldout_loss: Pair
    heldout_step: int | None
    seconds_per_step: Pair
    tokens_per_second: Pair
    memory: tuple[Pair, ...]
    first_step_seconds: tuple[Pair, ...]
    spread_seconds: tuple[Pair, ...]


@dataclass(frozen=True)
class Comparison:
    """What differs, and its effect.

    Attributes:
        a, b: the two sides.
        differences: by axis.
        contract: None unless exactly one axis moved.
        runs: None unless both sides are runs and at most one axis moved. If none did, it is the
            spread of one recipe from run to run.
        untried: layouts of A's recipe that were asked about.
        hbm: bytes of a GPU, if they are known.
    """

    a: Side
    b: Side
    differences: tuple[SettingDifference, ...]
    contract: ContractEffect | None
    runs: RunsEffect | None
    untried: tuple[Untried, ...] = ()
    hbm: int | None = None

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
        started = (a.resume, a.init_from, b.resume, b.init_from)
        if set(self.moved) & _DRAW_WEIGHTS and started == (None,) * 4:
            found.append(
                f"Both runs drew their own initial weights, rank by rank, and those depend on "
                f"{self.moved[0]}: the losses differ as those of two seeds do. Start both from one "
                f"checkpoint (resume=… or init_from=…) to see what the layout does to them."
            )
        one, two = (recipe.training.limit_val_batches for recipe in (a, b))
        if one != two:
            found.append(f"Held-out loss is over {one} batches in A, and over {two} in B.")
        return tuple(found)


def compare_sides(
    a: Side, b: Side, untried: tuple[Untried, ...] = (), **hardware: Any
) -> Comparison:
    """Compare two sides whose layouts are legal.

    Args:
        a, b: the sides.
        untried: other layouts of A's recipe, to show with them.
        hardware: further fields of a `Job`.
    """
    found = differences(a.recipe, b.recipe)
    moved = moved_axes(found)
    contract = runs = None
    hbm = hardware.get("hbm_bytes")
    if len(moved) == 1:
        one, two = (make_plan(job_of(side.recipe, **hardware)) for side in (a, b))
        contract = _contract_effect(one, two, hbm)
    if len(moved) <= 1 and a.curve is not None and b.curve is not None:
        runs = _runs_effect(a.curve, b.curve, hbm)
    return Comparison(a, b, tuple(found), contract, runs, untried, hbm)


def read_side(letter: str, source: str, overrides: Iterable[str], world: str | None) -> Side:
    """Resolve one side: a recipe, or the folder of a run.

    Args:
        letter: ``A`` or ``B``, for messages.
        source: a recipe's name, a YAML file, or a run folder.
        overrides: ``key=value`` settings of a recipe.
        world: of ``--world-size``.

    Raises:
        UserError: neither a recipe nor a run, an illegal layout, or settings for a run.
    """
    folder = Path(source)
    if source in CATALOG or not folder.is_dir():
        recipe, curve = resolve(source, overrides, world_size=world), None
        validate_countable(recipe)
    else:
        if overrides or world is not None:
            raise UserError(f"{letter} is a run, {folder}: its recipe cannot be changed.")
        run = read_run(folder)
        if run.recipe is None:
            raise UserError(f"{folder} cannot be compared: it has no {RECIPE_FILE}.")
        recipe, curve = run.recipe, run.curve
    shape = shape_of(recipe)
    try:
        if violations := check_layout(recipe.layout, shape):
            near = describe_nearest(recipe.layout, nearest_in_any_world(recipe.layout, shape))
            raise UserError(f"{describe_violations(recipe.layout, shape, violations)}\n{near}")
        validate_model(recipe)
    except UserError as error:
        raise UserError(f"{letter}, {source}: {error}") from None
    return Side(source, recipe, curve)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Return ``comparison`` as plain data."""
    number = {0: "no axis", 1: "one axis"}.get(len(comparison.moved), "several axes")
    return {
        "schema": SCHEMA,
        "a": _plain_side(comparison.a),
        "b": _plain_side(comparison.b),
        "moved": comparison.moved,
        "differences": [dataclasses.asdict(item) for item in comparison.differences],
        "conclusion": f"{number} moved",
        "contract": comparison.contract and _plain(vars(comparison.contract)),
        "runs": comparison.runs and _plain(vars(comparison.runs)),
        "untried": [layout.plain() for layout in comparison.untried],
        "notes": list(comparison.notes),
    }


def _plain_side(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "kind": "recipe" if side.curve is None else "run",
        "recipe": side.recipe.name,
        "layout": side.recipe.layout.short(),
        "world_size": side.recipe.layout.world,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Pair):
        return {**value._asdict(), "ratio": value.ratio}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _contract_effect(a: Plan, b: Plan, hbm: int | None) -> ContractEffect:
    """Return what differs between two plans."""
    kinds = ("parameters", "gradients", "optimizer", "activations", "total")
    memory = tuple(
        Pair(kind, getattr(a.fullest.memory, kind), getattr(b.fullest.memory, kind))
        for kind in kinds
    )
    memory += _headroom(hbm, memory[-1])
    one, two = _by_group(a), _by_group(b)
    groups = sorted({*one, *two}, key=lambda group: -max(one[group], two[group]))
    sent = [Pair(f"over {group}", one[group], two[group]) for group in groups]
    sent.append(Pair("in all", one.total(), two.total()))
    sent.append(Pair("between nodes", a.between_nodes, b.between_nodes))
    before, after = ([cost.message for cost in plan.costs] for plan in (a, b))
    return ContractEffect(
        memory,
        tuple(sent),
        tuple(line for line in after if line not in before),
        tuple(line for line in before if line not in after),
    )


def _by_group(plan: Plan) -> Counter[str]:
    sent: Counter[str] = Counter()
    for stage in plan.stages:
        for item in stage.traffic:
            sent[item.group] += item.sent_bytes * stage.ranks
    return sent


def _headroom(hbm: int | None, held: Pair) -> tuple[Pair, ...]:
    """Return what is left of a GPU's memory beside ``held``; less than 0 does not fit."""
    if hbm is None:
        return ()
    free = (None if value is None else hbm - value for value in held[1:])
    return (Pair("headroom", *free),)


def _runs_effect(a: Curve, b: Curve, hbm: int | None) -> RunsEffect:
    """Return how two runs' records differ."""
    mine, other = measured(a), measured(b)

    def pair(name: str, field: str) -> Pair:
        return Pair(name, getattr(mine, field), getattr(other, field))

    peak = pair("peak", "memory")
    one, two = _finite(a.losses), _finite(b.losses)
    common = sorted(one.keys() & two.keys())
    gaps: dict[Any, float] = {step: abs(one[step] - two[step]) for step in common}
    first, last = (common[0], common[-1]) if common else (None, None)
    worst: Any = max(gaps, key=lambda step: gaps[step], default=None)
    heldout_a, heldout_b = _finite(a.heldout), _finite(b.heldout)
    final = max(heldout_a.keys() & heldout_b.keys(), default=None)
    return RunsEffect(
        len(common),
        first,
        gaps.get(first),
        last,
        gaps.get(worst),
        worst,
        statistics.fmean(gaps.values()) if gaps else None,
        Pair("loss", one.get(last), two.get(last)),
        Pair("held-out loss", heldout_a.get(final), heldout_b.get(final)),
        final,
        pair("seconds per step", "step"),
        pair("tokens per second", "tokens_per_second"),
        (peak, pair("since the model's build", "memory_added"), *_headroom(hbm, peak)),
        (
            pair("first step", "first_step"),
            pair("its fastest rank", "first_fastest"),
            pair("its slowest rank", "first_slowest"),
        ),
        (pair("fastest tenth below", "step_low"), pair("slowest tenth above", "step_high")),
    )


def _finite(values: dict[int, Any]) -> dict[Any, float]:
    return {
        step: value for step, value in values.items() if value is not None and math.isfinite(value)
    }
