"""A recipe as the job that the contract plans."""

from __future__ import annotations

from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout.parallel import MAX_RANKS
from nemo_megacpp.recipes.recipe import Recipe


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


def validate_countable(recipe: Recipe) -> None:
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
