"""What each rank does to save a checkpoint's content again (:mod:`.rewrite` starts the ranks)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict, require_psutil
from nemo_megacpp.checkpoint.export import read_export
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.specs.model import build_hybrid_chunks

_CONTENT_METADATA = "content_metadata"


def rewrite_on_rank(
    source: Path, out: Path, model: dict[str, Any], layout: ParallelLayout
) -> tuple[int, int]:
    """Take a place in ``layout`` and :func:`rewrite`; ``model`` is the identity's."""
    start_model_parallel(layout)
    fields = config_fields(model, layout, torch.float32, "cpu")
    config = HybridConfig(**fields, perform_initialization=False)
    return rewrite(source, out, build_hybrid_chunks(config))


def import_on_rank(source: Path, out: Path, prefix: str) -> None:
    """Save the tensors of an exported folder, whole, under their names with ``prefix``."""
    require_psutil()
    sharded = {
        prefix + name: ShardedTensor.from_rank_offsets(prefix + name, tensor)
        for name, tensor in read_export(source).items()
    }
    dist_checkpointing.save(sharded, str(out))


def rewrite(source: Path, out: Path, chunks: list[torch.nn.Module]) -> tuple[int, int]:
    """Load everything of a checkpoint, split as ``chunks`` are split on these ranks, and save it.

    An optimizer tensor whose name ends with a parameter's, and that has its shape, is split as the
    parameter is. Rank 0 saves whole what belongs to no parameter or has another shape (padding of
    the vocabulary that depends on TP, buckets of a distributed optimizer), and the pickled objects.
    No value is computed: what is saved is what was loaded.

    Args:
        source: folder of the weights.
        out: a new folder, seen by all ranks.
        chunks: the model, built in the target layout; its weights are not read.

    Returns:
        How many tensors were split like a parameter, and how many were saved whole.
    """
    require_psutil()
    first = torch.distributed.get_rank() == 0
    content = CheckpointContent(source)
    own = _shards_by_key(chunks)
    everywhere: list[dict[str, tuple[int, ...]]] = [{}] * torch.distributed.get_world_size()
    shapes = {key: tuple(shards[0].global_shape) for key, shards in own.items()}
    torch.distributed.all_gather_object(everywhere, shapes)
    known = {key: shape for found in everywhere for key, shape in found.items()}
    wanted: dict[str, Any] = {}
    split = 0
    for name, info in content.tensors.items():
        dtype = getattr(torch, info.dtype)
        parameter = _parameter_of(name, info.shape, known)
        split += parameter is not None
        if parameter is not None:
            for number, shard in enumerate(own.get(parameter, ())):
                data = torch.empty(shard.local_shape, dtype=dtype)
                wanted[f"{name}#{number}"] = replace(shard, key=name, data=data, dtype=dtype)
        elif first:
            data = torch.empty(info.shape, dtype=dtype)
            wanted[f"{name}#0"] = ShardedTensor.from_rank_offsets(name, data)
    if first:
        objects = content.metadata.state_dict_metadata.keys() - content.tensors.keys()
        wanted |= {name: ShardedObject.empty_from_unique_key(name) for name in objects}
    loaded = dist_checkpointing.load(wanted.copy(), str(source))
    common = {key: value for key, value in loaded.items() if key not in wanted}
    saved = {key: replace(wanted[key], data=loaded[key]) for key in wanted}
    metadata = common.pop(_CONTENT_METADATA, None)
    dist_checkpointing.save({**common, **saved}, str(out), content_metadata=metadata)
    return split, len(content.tensors) - split


def _shards_by_key(chunks: list[torch.nn.Module]) -> dict[str, list[ShardedTensor]]:
    found: dict[str, list[ShardedTensor]] = {}
    for value in nested_values(model_sharded_state_dict(chunks)):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            if isinstance(part, ShardedTensor):
                found.setdefault(part.key, []).append(part)
    return found


def _parameter_of(
    name: str, shape: tuple[int, ...], known: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return the parameter whose name ends ``name``, if it has this shape."""
    while name:
        if name in known:
            return name if known[name] == shape else None
        name = name.partition(".")[2]
    return None
