"""Megatron's distributed checkpoint of bare model chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from nemo_megacpp.checkpoint.manifest import write_manifest
from nemo_megacpp.core.checkpoints import keep_common_file
from nemo_megacpp.errors import UserError


def require_psutil() -> None:
    """Refuse to save without psutil: Megatron-Core 0.16.1 needs it undeclared, and then hangs."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError(
            "Saving a distributed checkpoint needs the package psutil, which is not installed: "
            "pip install psutil."
        )


def sharding_metadata() -> dict[str, Any]:
    """Return the ``metadata`` argument of ``sharded_state_dict``."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def model_sharded_state_dict(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return one sharded state dict for all pipeline chunks of this rank, nested by chunk.

    The checkpoint keys layers by their global index, so the chunks are not part of it.
    """
    return {
        f"chunk{index}": chunk.sharded_state_dict(prefix="", metadata=sharding_metadata())  # type: ignore[operator]
        for index, chunk in enumerate(chunks)
    }


def save_sharded(
    state: dict[str, Any], directory: str | Path, content_metadata: dict[str, Any] | None = None
) -> None:
    """Save a sharded state dict and its manifest in ``directory``, which all ranks see."""
    require_psutil()
    directory = Path(directory)
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(directory), content_metadata=content_metadata)
    if torch.distributed.get_rank() == 0:
        keep_common_file(directory)
        write_manifest(directory)
    torch.distributed.barrier()


def save_model(chunks: Sequence[torch.nn.Module], directory: str | Path) -> None:
    """Save model weights; see :func:`save_sharded`."""
    save_sharded(model_sharded_state_dict(chunks), directory)


def fill_model(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    """Copy a loaded state of :func:`model_sharded_state_dict` into the chunks, strictly."""
    for index, chunk in enumerate(chunks):
        loaded = state[f"chunk{index}"]
        own = {name: loaded.get(name) for name in chunk.state_dict()}
        chunk.load_state_dict(own, strict=True)
