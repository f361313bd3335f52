"""Save and load bare model chunks with their optimizer, without NeMo.

What a NeMo run saved is loaded too: its keys name the wrapper around the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
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

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_WRAPPER = "module."
_MOMENT = re.compile(r"optimizer\.state\.\w+\.")


def names_a_wrapper(metadata: Metadata) -> bool:
    """Return whether a checkpoint names the wrapper around the model, as NeMo's runs do."""
    return any(name.startswith(_WRAPPER) for name in metadata.state_dict_metadata)


def name_without_wrapper(state: dict[str, Any]) -> None:
    """Take the wrapper out of every tensor's key, in place: as runs through Bridge name them."""
    for item, place in _keys(state):
        item.key = item.key[:place] + item.key[place:].removeprefix(_WRAPPER)


def _name_as_nemo(state: dict[str, Any]) -> None:
    """Give every tensor the key that it has in a checkpoint of NeMo."""
    for item, place in _keys(state):
        item.key = f"{item.key[:place]}{_WRAPPER}{item.key[place:]}"


def _keys(state: dict[str, Any]) -> Iterator[tuple[ShardedBase, int]]:
    """Yield what has a key, and where in it the name of the parameter begins."""
    for item in nested_values(state):
        if isinstance(item, ShardedBase):
            match = _MOMENT.match(item.key)
            yield item, match.end() if match else 0


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
    of_nemo = names_a_wrapper(metadata)
    if of_nemo:
        _name_as_nemo(state)
        state["optimizer"] = [state["optimizer"]]
    fit_to_checkpoint(state, metadata)
    state = dist_checkpointing.load(state, str(weights))
    if of_nemo:
        (state["optimizer"],) = state["optimizer"]
    fill_model(chunks, state["model"])
    load_optimizer_state_dict(optimizer, state["optimizer"])
