"""The weights of any checkpoint in a built model, in the layout of these ranks, without an
optimizer.

A checkpoint of a NeMo run, of Megatron's script, of Megatron-Bridge, of ``checkpoint import`` and a
bare folder of weights differ in the prefix of their tensors' names, and in whether they say which
model they hold (:mod:`nemo_megacpp.checkpoint.identity`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)

from nemo_megacpp.checkpoint.backends import fit_to_checkpoint, in_side_channels
from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.dcp import fill_model, model_sharded_state_dict
from nemo_megacpp.checkpoint.guard import guard_load
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks

WRAPPER = "module."
"""Prefix of the names of a model's tensors in the checkpoint of a run through NeMo."""

Shapes = dict[str, tuple[int, ...] | None]
"""Global shape by name; None where Megatron pads a tensor as the layout needs it."""
_MOMENT = re.compile(r"optimizer\.state\.\w+\.")
_SHOWN = 3


def load_weights(
    chunks: Sequence[torch.nn.Module],
    directory: str | Path,
    *,
    verify: bool = True,
    new_side_channels: bool = False,
) -> None:
    """Load the model's weights of a checkpoint, saved in any layout on any backend, into this one.

    Every rank of the default process group calls this.

    Args:
        chunks: this rank's pipeline chunks, unwrapped, in any dtype.
        directory: a checkpoint of any kind, or its weights.
        verify: compare every byte with the manifest first, where there is one.
        new_side_channels: of :func:`nemo_megacpp.checkpoint.backends.fit_to_checkpoint`.

    Raises:
        UserError: on every rank; the checkpoint is damaged, loading it would run code, or it lacks
            a tensor of the model or has others. Nothing is loaded then.
    """
    content = CheckpointContent(guard_load(Path(directory), verify=verify))
    wanted = model_sharded_state_dict(chunks)
    replace_prefix(wanted, "", content.prefix)
    fit_to_checkpoint(wanted, content.metadata, new_side_channels=new_side_channels)
    validate_tensors(wanted, content, new_side_channels=new_side_channels)
    fill_model(chunks, dist_checkpointing.load(wanted, str(content.weights)))


def build_saved_model(
    model: Mapping[str, Any], layout: ParallelLayout, dtype: torch.dtype
) -> tuple[HybridConfig, list[torch.nn.Module]]:
    """Build this rank's pipeline chunks of a saved model, on its device, for :func:`load_weights`.

    The process groups of ``layout`` exist (:func:`nemo_megacpp.runtime.distributed.
    start_model_parallel`).

    Args:
        model: fields of an identity (:class:`nemo_megacpp.checkpoint.identity.Identity`).
        layout: of these ranks.
        dtype: of parameters and activations. In a float64 model every parameter is float64; with
            another dtype mixers keep a few in float32.

    Returns:
        The configuration, and the chunks in evaluation mode, whose parameters hold anything.

    Raises:
        UserError: settings that a module refuses.
    """
    fields = config_fields(model, layout, dtype, current_host().device)
    config = HybridConfig(**{**fields, "perform_initialization": False})
    chunks = build_hybrid_chunks(config)
    for chunk in chunks:
        chunk.to(torch.device(torch.cuda.current_device()))
        if dtype == torch.float64:
            for parameter in chunk.parameters():
                parameter.data = parameter.data.double()
        chunk.eval()
    return config, chunks


def with_prefix(name: str, old: str, new: str) -> str:
    """Return the saved name of a model's tensor, or of one of its optimizer's, with the prefix
    ``new`` instead of ``old``."""
    match = _MOMENT.match(name)
    place = match.end() if match else 0
    if name.startswith(old, place):
        name = f"{name[:place]}{new}{name[place + len(old) :]}"
    return name


def replace_prefix(state: dict[str, Any], old: str, new: str) -> None:
    """Replace the prefix of the names of a model's tensors, and of its optimizer's, in place."""
    if old == new:
        return
    for item in nested_values(state):
        if isinstance(item, ShardedBase):
            item.key = with_prefix(item.key, old, new)


def validate_tensors(
    state: dict[str, Any], content: CheckpointContent, *, new_side_channels: bool = False
) -> None:
    """Refuse a checkpoint that has other tensors of a model than ``state``; every rank calls this.

    Args:
        state: sharded state of the model on this rank, under the names that the checkpoint has.
        content: the checkpoint.
        new_side_channels: accept tensors of side channels that only one of both has.

    Raises:
        UserError: on every rank, with the names.
    """
    everywhere: list[Shapes] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, tensor_shapes(state))
    wanted = {name: shape for found in everywhere for name, shape in found.items()}
    validate_shapes(wanted, content, new_side_channels=new_side_channels)


def tensor_shapes(state: dict[str, Any]) -> Shapes:
    """Return the global shapes of a sharded state's tensors, by name."""
    return {
        part.key: None if part.allow_shape_mismatch else tuple(part.global_shape)
        for part in _tensors(state)
    }


def validate_shapes(
    wanted: Shapes, content: CheckpointContent, *, new_side_channels: bool = False
) -> None:
    """Refuse a checkpoint that has other tensors of a model than ``wanted``, those of all its
    ranks; see :func:`validate_tensors`."""
    saved = {content.prefix + name: info.shape for name, info in content.model_tensors.items()}
    extra = [
        name
        for name in saved
        if name not in wanted and not (new_side_channels and in_side_channels(name))
    ]
    found = (
        ("has no", [name for name in sorted(wanted) if name not in saved]),
        ("has also", extra),
        (
            "has another shape of",
            [
                f"{name} ({_shape(saved[name])} there, {_shape(shape)} here)"
                for name, shape in sorted(wanted.items())
                if shape is not None and saved.get(name, shape) != shape
            ],
        ),
    )
    differences = [f"it {what} {_listed(names)}" for what, names in found if names]
    if differences:
        raise UserError(
            f"{content.directory} is a checkpoint of another model: {'; '.join(differences)}."
        )


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        yield from (part for part in parts if isinstance(part, ShardedTensor))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
