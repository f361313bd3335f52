"""A layout that was not run: why it is illegal, or what it would hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import (
    ParallelLayout,
    check_layout,
    describe_nearest,
    nearest_in_any_world,
)
from nemo_megacpp.layout.parallel import read_degrees
from nemo_megacpp.preflight.model_checks import validate_model
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import job_of, shape_of, validate_countable


@dataclass(frozen=True)
class Untried:
    """A layout of a recipe.

    Attributes:
        layout: its degrees.
        reasons: why it is illegal; none if it is legal.
        nearest: legal layouts near an illegal one; advice is the sentence that names them.
        memory: bytes of its fullest rank by plan, of a legal one.
    """

    layout: ParallelLayout
    reasons: tuple[str, ...] = ()
    nearest: tuple[ParallelLayout, ...] = ()
    advice: str = ""
    memory: int | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "layout": self.layout.short(),
            "legal": not self.reasons,
            "reasons": list(self.reasons),
            "nearest": [layout.short() for layout in self.nearest],
            "memory": self.memory,
        }


def judge_layout(recipe: Recipe, degrees: str, **hardware: Any) -> Untried:
    """Return what is known of ``recipe`` with other degrees.

    Args:
        recipe: resolved.
        degrees: as ``--layout`` takes them: they change the recipe's layout.
        hardware: further fields of a `Job`; TP groups may not leave ``gpus_per_node``.

    Raises:
        UserError: degrees that cannot be read, or more ranks than are planned.
    """
    layout = recipe.layout.changed(read_degrees(degrees))
    other = dataclasses.replace(recipe, layout=layout)
    validate_countable(other)
    shape, gpus = shape_of(other), hardware.get("gpus_per_node")
    violations = check_layout(layout, shape, gpus_per_node=gpus)
    if violations:
        nearest = nearest_in_any_world(layout, shape, gpus_per_node=gpus)
        reasons = tuple(map(str, violations))
        return Untried(layout, reasons, tuple(nearest), describe_nearest(layout, nearest))
    try:
        validate_model(other)
    except UserError as error:  # what Megatron refuses of this model in this layout
        return Untried(layout, (str(error),))
    return Untried(layout, memory=make_plan(job_of(other, **hardware)).fullest.memory.total)
