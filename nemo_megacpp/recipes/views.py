"""A resolved recipe as other rooms read it: sizes, fields of the configuration, a job to plan."""

from __future__ import annotations

from typing import Any

import torch

from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.errors import UserError
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout import ModelShape
from nemo_megacpp.layout.parallel import MAX_RANKS
from nemo_megacpp.proof.small_models import DRAWN
from nemo_megacpp.recipes.recipe import Recipe


def shape_of(recipe: Recipe) -> ModelShape:
    """Return the sizes that layout rules read."""
    defaults = {name: field.default for name, field in HybridConfig.__dataclass_fields__.items()}
    sizes = {name: recipe.model.get(name, default) for name, default in defaults.items()}
    return ModelShape.read(
        {**sizes, "pattern": recipe.pattern},
        recipe.training.micro_batch_size,
        recipe.training.global_batch_size,
    )


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Return the dtype of parameters and activations."""
    return torch.float32 if recipe.training.precision == "fp32" else torch.bfloat16


def model_settings(recipe: Recipe, device: str) -> dict[str, Any]:
    """Return the fields of :class:`nemo_megacpp.config.HybridConfig`.

    Args:
        recipe: resolved.
        device: ``"cuda"`` or ``"cpu"``, which decides where weights are initialised.
    """
    return config_fields(recipe.model, recipe.layout, dtype_of(recipe), device)


def job_of(recipe: Recipe, **hardware: Any) -> Job:
    """Return the job that the contract plans; ``hardware`` are further fields of a `Job`."""
    training = recipe.training
    return Job(
        recipe.model,
        recipe.layout,
        training.micro_batch_size,
        training.global_batch_size,
        training.precision,
        training.use_distributed_optimizer,
        name=recipe.name,
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.gathers_in_forward,
        **hardware,
    )


def validate_countable(recipe: Recipe) -> None:
    """Validate that a plan can count the ranks of the world.

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


def differences_from(recipe: Recipe) -> list[str]:
    """Return the defaults that the recipe takes, and what of it a proof leaves out, as lines."""
    drawn = [
        f"{name}={value}" for name, value in recipe.model.items() if value != DRAWN.get(name, value)
    ]
    lines = [f"defaults taken: {'; '.join(recipe.assumed)}"] if recipe.assumed else []
    if drawn:
        lines.append(f"without {', '.join(drawn)}: each rank draws random numbers of its own")
    return lines
