"""Gather the values of a sharded model in their global shapes, and shard them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    dict_list_map_outplace,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)

from nemo_megacpp.checkpoint.dcp import fill_model, model_sharded_state_dict

_T = TypeVar("_T")


@dataclass
class GlobalValues:
    """Values by checkpoint key, in global shape.

    Attributes:
        values: the reassembled arrays.
        replica_spread: for keys that several ranks hold, the largest difference between replicas,
            relative to the largest value. Replicas are equal in a correct layout.
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    replica_spread: dict[str, float] = field(default_factory=dict)

    def add(self, others: GlobalValues, suffix: str = "") -> None:
        """Add ``others``, with ``suffix`` at the end of their keys."""
        self.values |= {f"{key}{suffix}": value for key, value in others.values.items()}
        spread = others.replica_spread.items()
        self.replica_spread |= {f"{key}{suffix}": value for key, value in spread}


class LocalPart(NamedTuple):
    """One rank's part of a tensor.

    Attributes:
        key: of the tensor.
        shape: of the whole.
        place: numpy index of the part in the whole.
        data: the part.
        partial: whether parts at the same place are summed; else they are replicas.
    """

    key: str
    shape: tuple[int, ...]
    place: tuple
    data: np.ndarray
    partial: bool = False


def gather_values(
    chunks: Sequence[torch.nn.Module],
    value_of: Callable[[torch.Tensor], torch.Tensor | None] = lambda parameter: parameter,
) -> GlobalValues | None:
    """Gather ``value_of(parameter)`` for every saved tensor to rank 0.

    The model's own ``sharded_state_dict`` says where each part belongs, so what is compared is
    what is saved.

    Args:
        chunks: this rank's model chunks, unwrapped.
        value_of: maps a parameter or buffer to the tensor to gather (same shape), None to skip.

    Returns:
        The values on rank 0, None elsewhere.
    """
    state = model_sharded_state_dict(chunks)

    def replace(item: Any) -> Any:
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and item.data is not None:
            item.data = value_of(item.data)
        return item

    dict_list_map_inplace(replace, state)
    for part in state.values():
        for key in [k for k, v in part.items() if getattr(v, "data", v) is None]:
            del part[key]
    return gather_sharded(state)


def shard_values(chunks: Sequence[torch.nn.Module], values: GlobalValues) -> None:
    """Load this rank's part of the values that :func:`gather_values` gathered.

    Args:
        chunks: this rank's model chunks, unwrapped.
        values: of every saved tensor, on every rank.
    """

    def part(item: Any) -> Any:
        if not isinstance(item, ShardedTensor):
            return item
        mine = torch.from_numpy(values.values[item.key][item.global_slice()].copy())
        return mine.reshape(item.data.shape).to(item.data)

    state = model_sharded_state_dict(chunks)
    for chunk in state.values():
        for name, item in chunk.items():
            if isinstance(item, ShardedTensorFactory):
                chunk[name] = item.merge_fn(dict_list_map_outplace(part, item.build()))
            elif isinstance(item, ShardedTensor):
                chunk[name] = part(item)
            else:
                chunk[name] = getattr(item, "data", item)
    fill_model(chunks, state)


def gather_sharded(state: dict[str, Any]) -> GlobalValues | None:
    """Gather every tensor of a sharded state dict to rank 0; None elsewhere."""
    apply_factories(state)
    parts = [
        LocalPart(item.key, item.global_shape, item.global_slice(), to_numpy(item.data))
        for item in nested_values(state)
        if isinstance(item, ShardedTensor)
    ]
    return gather_parts(parts)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy on the host; bfloat16, which numpy lacks, becomes float32 without loss."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor.clone()).numpy()


def gather_parts(parts: Sequence[LocalPart]) -> GlobalValues | None:
    """Gather the parts of all ranks and assemble them on rank 0; None elsewhere.

    Elements that no rank holds are NaN, which differs from anything.
    """
    everyone = gather_objects(list(parts))
    return None if everyone is None else _assemble([p for rank in everyone for p in rank])


def gather_objects(mine: _T) -> list[_T] | None:
    """Return what every rank gave, by rank, on rank 0; None elsewhere."""
    first = torch.distributed.get_rank() == 0
    everyone: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(mine, everyone)
    return everyone


def _assemble(parts: Sequence[LocalPart]) -> GlobalValues:
    gathered = GlobalValues()
    filled: dict[str, np.ndarray] = {}
    for key, shape, place, data, partial in parts:
        whole = gathered.values.setdefault(key, np.zeros(shape, dtype=data.dtype))
        known = filled.setdefault(key, np.zeros(shape, dtype=bool))
        data = data.reshape(whole[place].shape)
        if partial:
            whole[place] += data
        elif not known[place].any():
            whole[place] = data
        else:
            scale = max(float(np.abs(data).max(initial=0.0)), np.finfo(data.dtype).tiny)
            spread = float(np.abs(whole[place] - data).max(initial=0.0)) / scale
            known_spread = gathered.replica_spread.get(key, 0.0)
            gathered.replica_spread[key] = float(np.maximum(known_spread, spread))  # NaN stays
        known[place] = True
    for key, known in filled.items():
        gathered.values[key][~known] = np.nan
    return gathered
