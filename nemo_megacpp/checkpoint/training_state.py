"""Save and load bare model chunks with their optimizer, without NeMo.

What a NeMo run saved is loaded too: its keys name the wrapper around the model. So is what
Megatron's script saved (:mod:`nemo_megacpp.checkpoint.script_state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer

from nemo_megacpp.checkpoint.backends import fit_to_checkpoint
from nemo_megacpp.checkpoint.dcp import fill_model, save_sharded
from nemo_megacpp.checkpoint.folder import find_weights
from nemo_megacpp.checkpoint.guard import guard_load
from nemo_megacpp.checkpoint.optimizer_state import (
    content_metadata,
    load_optimizer_state_dict,
    training_sharded_state_dict,
    validate_optimizer_form,
)
from nemo_megacpp.checkpoint.safe_pickle import read_metadata
from nemo_megacpp.checkpoint.script_state import common_optimizer
from nemo_megacpp.checkpoint.weights import WRAPPER, replace_prefix


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
        directory: a checkpoint of a run, or what :func:`save_training_state` wrote.

    Raises:
        UserError: the checkpoint is damaged, loading it would run code, or its optimizer state has
            another form; nothing is loaded then.
    """
    weights = find_weights(guard_load(Path(directory), verify=True))
    validate_optimizer_form(dist_checkpointing.load_content_metadata(str(weights)))
    state = training_sharded_state_dict(chunks, optimizer, is_loading=True)
    metadata = read_metadata(weights)
    of_nemo = any(name.startswith(WRAPPER) for name in metadata.state_dict_metadata)
    replace_prefix(state, "", WRAPPER if of_nemo else "")
    state["tensors"] = state.pop("optimizer")["tensors"]
    fit_to_checkpoint(state, metadata)
    state = dist_checkpointing.load(state, str(weights))
    fill_model(chunks, state["model"])
    common = common_optimizer(state["optimizer"])
    load_optimizer_state_dict(optimizer, {**common, "tensors": state["tensors"]})
