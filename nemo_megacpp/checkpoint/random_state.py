"""The states of the ranks' random-number generators in a checkpoint: plain tensors, one per rank.

A step (dropout) draws from torch's generators and from Megatron's tracker, whose states differ
between the ranks of a tensor- or expert-parallel group. They are saved for every rank, under a key
that names the layout: ranks of another layout hold other parts of the model, and restart from the
seed. No step draws from Python's and NumPy's generators, which are not saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor

RandomState = dict[str, torch.Tensor]
"""Generator states, uint8, by name: ``cpu``, ``device`` and the tracker's."""

_KEY = "random_state"
_TRACKER = "tracker."


def random_state() -> RandomState:
    """Return copies of the states of this rank's generators."""
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state().cpu(),
        **{f"{_TRACKER}{name}": _bytes(state) for name, state in tracked.items()},
    }


def set_random_state(state: RandomState) -> None:
    """Put this rank's generators into ``state``."""
    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["cpu"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    kept = tracker.get_states()
    for name, own in kept.items():
        if isinstance(own, torch.Generator):
            own.set_state(state[f"{_TRACKER}{name}"])
        else:
            kept[name] = state[f"{_TRACKER}{name}"].clone()
    tracker.set_states(kept)


def sharded_random_state(state: RandomState) -> dict[str, ShardedTensor]:
    """Return ``state`` as this rank's rows of tensors ``[world size, bytes]``."""
    place = (0, torch.distributed.get_rank(), torch.distributed.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(
            f"{_KEY}.{_layout()}.{name}", value, place, prepend_axis_num=1
        )
        for name, value in state.items()
    }


def load_random_state(directory: str | Path) -> RandomState | None:
    """Return this rank's saved states, or None if the checkpoint was saved in another layout or on
    another kind of host, or holds none."""
    wanted = sharded_random_state(random_state())
    saved = dist_checkpointing.load_tensors_metadata(str(directory))
    for tensor in wanted.values():
        if tensor.key not in saved or saved[tensor.key].global_shape != tensor.global_shape:
            return None
    loaded = dist_checkpointing.load({_KEY: wanted}, str(directory))[_KEY]
    return {name: value.cpu() for name, value in loaded.items()}


def _bytes(state: Any) -> torch.Tensor:
    """A tracker made for CUDA graphs holds generators, any other their states."""
    return (state.get_state() if isinstance(state, torch.Generator) else state).cpu().clone()


def _layout() -> str:
    """Name the degrees that decide which part of the model a rank has."""
    world = torch.distributed.get_world_size()
    degrees = {
        "world": world,
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return "-".join(f"{name}{degree}" for name, degree in degrees.items())
