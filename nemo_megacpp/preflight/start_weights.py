"""Whether a run can load the weights of a checkpoint, before its ranks are started."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nemo_megacpp.checkpoint.backends import fit_to_checkpoint
from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict
from nemo_megacpp.checkpoint.weights import replace_prefix, tensor_shapes, validate_shapes
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import model_settings
from nemo_megacpp.runtime.distributed import fake_rank
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks


def validate_start_weights(checkpoint: Path, recipe: Recipe) -> None:
    """Refuse to load the weights of another model.

    A checkpoint that says its model was compared with the recipe already. Of one that does not (of
    Megatron's script), names and shapes are compared with those of the recipe's model, which is
    built without memory. The ranks compare both again when they load.

    Args:
        checkpoint: found by :func:`nemo_megacpp.preflight.resume.find_resume`.
        recipe: resolved.

    Raises:
        UserError: it cannot be read, or holds other tensors.
    """
    content = CheckpointContent(checkpoint)
    if content.identity is not None or not content.tensors or torch.distributed.is_initialized():
        return
    alone = dataclasses.replace(recipe, layout=ParallelLayout())
    fields = {**model_settings(alone, current_host().device), "perform_initialization": False}
    new = recipe.training.init_side_channels == "any"
    with fake_rank(ParallelLayout(), 0), torch.device("meta"):
        state = model_sharded_state_dict(build_hybrid_chunks(HybridConfig(**fields)))
        replace_prefix(state, "", content.prefix)
        fit_to_checkpoint(state, content.metadata, new_side_channels=new)
        shapes = tensor_shapes(state)
    validate_shapes(shapes, content, new_side_channels=new)
