"""Everything that the next training step depends on, apart from the data: model and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer

from nemo_megacpp.checkpoint.dcp import fill_model, model_sharded_state_dict, save_sharded
from nemo_megacpp.checkpoint.guard import guard_load
from nemo_megacpp.checkpoint.optimizer_state import (
    content_metadata,
    load_optimizer_state_dict,
    optimizer_sharded_state_dict,
    validate_optimizer_form,
)


def training_sharded_state_dict(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, *, is_loading: bool = False
) -> dict[str, Any]:
    """Return one sharded state dict of this rank's model chunks and their optimizer."""
    model = model_sharded_state_dict(chunks)
    return {
        "model": model,
        "optimizer": optimizer_sharded_state_dict(optimizer, model, is_loading=is_loading),
    }


def save_training_state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, directory: str | Path
) -> None:
    """Save weights and optimizer; ``directory`` is made and must be seen by all ranks."""
    save_sharded(
        training_sharded_state_dict(chunks, optimizer),
        directory,
        content_metadata(optimizer.config.use_distributed_optimizer),
    )


def load_training_state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, directory: str | Path
) -> None:
    """Load weights and optimizer, saved in any layout, into this one, strictly.

    Args:
        chunks: this rank's model chunks, unwrapped.
        optimizer: over these chunks; may be another kind than the one that was saved.
        directory: written by :func:`save_training_state`.

    Raises:
        UserError: the checkpoint is damaged, loading it would run code, or its optimizer state has
            another form; nothing is loaded then.
    """
    guard_load(Path(directory), verify=True)
    validate_optimizer_form(dist_checkpointing.load_content_metadata(str(directory)))
    state = dist_checkpointing.load(
        training_sharded_state_dict(chunks, optimizer, is_loading=True), str(directory)
    )
    fill_model(chunks, state["model"])
    load_optimizer_state_dict(optimizer, state["optimizer"])
