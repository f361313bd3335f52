"""A resolved recipe as the fields of its model's configuration."""

from __future__ import annotations

from typing import Any

import torch

from nemo_megacpp.recipes.recipe import Recipe


def model_settings(recipe: Recipe, device: str) -> dict[str, Any]:
    """Return every field of :class:`nemo_megacpp.config.HybridConfig` that ``recipe`` settles.

    Args:
        recipe: resolved.
        device: ``"cuda"`` or ``"cpu"``, which decides where weights are initialised.
    """
    dtype = torch.float32 if recipe.training.precision == "fp32" else torch.bfloat16
    return {
        **recipe.model,
        **recipe.layout.megatron_fields(),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": device == "cpu",
        "moe_router_dtype": "fp32",
    }
