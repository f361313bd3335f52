"""A resolved recipe as the sizes that layout rules read, and as its model's configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.layout import ModelShape
from nemo_megacpp.recipes.recipe import Recipe


def shape_of(recipe: Recipe) -> ModelShape:
    """Return what the layout rules want to know about ``recipe``."""
    defaults = {f.name: f.default for f in dataclasses.fields(HybridConfig)}
    sizes = {name: recipe.model.get(name, default) for name, default in defaults.items()}
    return ModelShape.read(
        {**sizes, "pattern": recipe.pattern},
        recipe.training.micro_batch_size,
        recipe.training.global_batch_size,
    )


def model_settings(recipe: Recipe, device: str) -> dict[str, Any]:
    """Return every field of :class:`nemo_megacpp.config.HybridConfig` that ``recipe`` settles.

    Args:
        recipe: resolved.
        device: ``"cuda"`` or ``"cpu"``, which decides where weights are initialised.
    """
    dtype = torch.float32 if recipe.training.precision == "fp32" else torch.bfloat16
    return config_fields(recipe.model, recipe.layout, dtype, device)
