"""Megatron's distributed checkpoint of bare model chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from nemo_megacpp.errors import UserError


def require_psutil() -> None:
    """Megatron-Core 0.16.1 saves through psutil without declaring it, and hangs for ever when it
    is missing."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError(
            "Saving a distributed checkpoint needs the package psutil, which is not installed: "
            "pip install psutil."
        )


def sharding_metadata() -> dict[str, Any]:
    """Return what ``sharded_state_dict`` wants to know about the job."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def model_sharded_state_dict(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return one sharded state dict for all pipeline chunks of this rank.

    Layers are keyed by their global index, so chunks never collide and the checkpoint does not
    know how the depth was cut.
    """
    merged: dict[str, Any] = {}
    for chunk in chunks:
        part = chunk.sharded_state_dict(prefix="", metadata=sharding_metadata())  # type: ignore[operator]
        clash = merged.keys() & {k for k, v in part.items() if v is not None}
        assert not clash, f"two pipeline chunks save {sorted(clash)[:3]}"
        merged.update(part)
    return merged


def save_model(chunks: Sequence[torch.nn.Module], directory: str | Path) -> None:
    """Save model weights; ``directory`` is created on rank 0 and must be seen by all ranks."""
    require_psutil()
    directory = Path(directory)
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model_sharded_state_dict(chunks), str(directory))


def load_model(chunks: Sequence[torch.nn.Module], directory: str | Path) -> None:
    """Load model weights saved in any layout into this one, strictly."""
    state = dist_checkpointing.load(model_sharded_state_dict(chunks), str(directory))
    own = [set(chunk.state_dict().keys()) for chunk in chunks]
    for chunk, names in zip(chunks, own, strict=True):
        chunk.load_state_dict({name: state.get(name) for name in names}, strict=True)
