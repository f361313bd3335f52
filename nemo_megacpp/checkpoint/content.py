"""What a distributed checkpoint holds, read without a process group and without running it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.checkpoint.folder import find_checkpoint, find_weights
from nemo_megacpp.checkpoint.identity import Identity, read_identity, saved_model
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.checkpoint.safe_pickle import (
    EXTRA_STATE,
    METADATA,
    read_metadata,
    read_object,
    read_torch_file,
)
from nemo_megacpp.core.checkpoints import COMMON, COMMON_OBJECT, FSDP_ARGUMENTS
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ModelShape, ParallelLayout, is_legal

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

_WRAPPERS = ("module.", "model.")
"""Prefixes that NeMo and Megatron's script give to the names of a model's tensors."""
_OPTIMIZER = "optimizer."
_NOT_THE_MODEL = (_OPTIMIZER, "random_state.")
"""Prefixes of what is saved beside the model's tensors."""
CONSUMED = "consumed_train_samples"
"""Key of what is not sharded: rows that a run has trained on, of all data-parallel ranks."""
_OF_DATA_MODULE = "consumed_samples"
_SHOWN = ("num_layers", "hidden_size", "vocab_size")
_AXES = ("tp", "cp", "pp", "ep", "etp")
_LARGEST_DEGREE = 64
_MOST_DIGITS = 10


@dataclass(frozen=True)
class TensorInfo:
    """One saved tensor.

    Attributes:
        shape: global.
        dtype: torch's name of it, such as ``float32``.
        shards: number of pieces that it is saved in.
        bytes: its size.
    """

    shape: tuple[int, ...]
    dtype: str
    shards: int
    bytes: int


class CheckpointContent:
    """A checkpoint, opened for reading.

    Args:
        path: as :func:`nemo_megacpp.checkpoint.folder.find_checkpoint` takes it.

    Raises:
        UserError: there is no checkpoint, it is incomplete or one of Megatron's FSDP, or its
            metadata is damaged or unsafe.
    """

    def __init__(self, path: Path):
        self.directory = find_checkpoint(path)
        self.weights = find_weights(self.directory)
        self.metadata: Metadata = read_metadata(self.weights)
        if FSDP_ARGUMENTS in self.metadata.state_dict_metadata:
            raise UserError(
                f"{self.directory} is a checkpoint of Megatron's FSDP (fsdp_dtensor). Only "
                f"Megatron's script reads it, with --use-megatron-fsdp --load (docs/fsdp.md)."
            )
        self.identity = read_identity(self.directory)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors by their saved names."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        return {
            name: TensorInfo(
                tuple(saved.size),
                str(saved.properties.dtype).removeprefix("torch."),
                len(saved.chunks),
                math.prod(saved.size) * saved.properties.dtype.itemsize,
            )
            for name, saved in self.metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
        }

    @property
    def prefix(self) -> str:
        """Prefix of the names of the model's tensors: ``module.``, ``model.`` or nothing."""
        model = [name for name in self.tensors if not name.startswith(_NOT_THE_MODEL)]
        for wrapper in _WRAPPERS:
            if model and all(name.startswith(wrapper) for name in model):
                return wrapper
        return ""

    @property
    def model_tensors(self) -> dict[str, TensorInfo]:
        """The model's tensors, by the model's own names, layer after layer."""
        names = [name for name in self.tensors if not name.startswith(_NOT_THE_MODEL)]
        return {
            name.removeprefix(self.prefix): self.tensors[name] for name in sorted(names, key=_order)
        }

    @property
    def other_tensors(self) -> dict[str, TensorInfo]:
        """Tensors of the optimizer and of random states, by their saved names."""
        return {n: info for n, info in self.tensors.items() if n.startswith(_NOT_THE_MODEL)}

    @property
    def optimizer_tensors(self) -> list[str]:
        """Names of the optimizer's tensors."""
        return [name for name in self.tensors if name.startswith(_OPTIMIZER)]

    @property
    def objects(self) -> list[str]:
        """Names of pickled objects, except the modules' ``_extra_state`` and :meth:`common`."""
        return [
            name
            for name in self.metadata.state_dict_metadata
            if name not in self.tensors and EXTRA_STATE not in name and name != COMMON_OBJECT
        ]

    @property
    def step(self) -> int | None:
        """Optimizer steps, as its identity, NeMo's trainer or Megatron's script saved them."""
        if self.identity is not None:
            return self.identity["step"]
        common = self.common()
        step = common.get("global_step", common.get("iteration"))
        return step if isinstance(step, int) else None

    @property
    def consumed_samples(self) -> int | None:
        """Rows that the run had trained on, as NeMo's data module or a run through Bridge saved
        them; None where neither did."""
        common = self.common()
        modules = (value for value in common.values() if isinstance(value, dict))
        of_nemo = next(
            (value[_OF_DATA_MODULE] for value in modules if _OF_DATA_MODULE in value), None
        )
        rows = common.get(CONSUMED, of_nemo)
        return rows if isinstance(rows, int) and rows >= 0 else None

    def common(self) -> dict[str, Any]:
        """Return what is not sharded: ``common.pt``, or the object that takes its place.

        Raises:
            UserError: it is missing, damaged or unsafe.
        """
        path = self.weights / COMMON
        if not path.exists() and COMMON_OBJECT in self.metadata.state_dict_metadata:
            held = read_object(self.weights, self.metadata, COMMON_OBJECT)
            if isinstance(held, list) and len(held) == 1:  # an object's array of one
                (held,) = held
        else:
            held = read_torch_file(path)
        if not isinstance(held, dict):
            raise UserError(f"{path} is damaged: it holds a {type(held).__name__}.")
        return held

    def read_tensor(self, name: str) -> torch.Tensor:
        """Return one whole tensor, of its global shape, assembled from its shards by torch.

        Raises:
            UserError: a shard is missing or damaged, or a part of the tensor is in no shard.
        """
        import torch
        from torch.distributed import checkpoint as dcp

        saved = self.metadata.state_dict_metadata[name]
        covered = sum(math.prod(chunk.sizes) for chunk in saved.chunks)
        if covered != math.prod(saved.size):
            raise UserError(
                f"{self.weights / METADATA} is damaged: {name} has {math.prod(saved.size):,} "
                f"elements, and its shards hold {covered:,}."
            )
        reader = dcp.FileSystemReader(self.weights)
        reader.read_metadata = lambda *_, **__: self.metadata  # type: ignore[method-assign]
        held = {name: torch.empty(saved.size, dtype=saved.properties.dtype)}
        try:
            dcp.load(held, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            ((failure, _), *_rest) = error.failures.values()
            reason = (str(failure) or type(failure).__name__).splitlines()[0].rstrip(".")
            raise UserError(f"{self.weights} is damaged at {name}: {reason}.") from None
        return held[name]


def _order(name: str) -> list[tuple[int, str]]:
    """Sort numbers in names as numbers: layer 2 before layer 10."""
    return [
        (int(part), "") if part.isdecimal() and len(part) < _MOST_DIGITS else (-1, part)
        for part in name.split(".")
    ]


def saved_shape(directory: Path, identity: Identity) -> ModelShape:
    """Return a saved model's sizes as the layout rules read them, without batch sizes.

    Raises:
        UserError: the identity is damaged.
    """
    fields, pattern = saved_model(directory, identity)
    return ModelShape.read({**fields, "pattern": pattern}, None, None)


def _legal_degrees(shape: ModelShape) -> dict[str, list[int]]:
    """Return the degrees of each axis, up to 64, that load the model with all other axes at 1."""
    return {
        axis: [
            degree
            for degree in range(1, _LARGEST_DEGREE + 1)
            if is_legal(ParallelLayout.parse(f"{axis}={degree}"), shape)
        ]
        for axis in _AXES
    }


def describe(path: Path) -> dict[str, Any]:
    """Return everything that ``inspect`` prints, as plain data.

    Raises:
        UserError: no checkpoint, or one whose metadata or identity cannot be read.
    """
    content = CheckpointContent(path)
    identity = content.identity
    shape = model = None
    if identity is not None:
        fields, _ = saved_model(content.directory, identity)
        model = {**{name: fields[name] for name in _SHOWN}, **identity["model"]}
        shape = saved_shape(content.directory, identity)
    try:
        manifest = check_manifest(content.directory, full=False)
    except UserError as damage:
        manifest = f"damaged: {damage}"
    tensors = content.model_tensors
    files = [path for path in content.directory.rglob("*") if path.is_file()]
    return {
        "checkpoint": str(content.directory),
        "step": content.step,
        "model": model,
        "pattern": None if shape is None else shape.pattern.uncut,
        "layout": None if identity is None else identity.get("layout"),
        "tokenizer": None if identity is None else identity["tokenizer"],
        "bytes": sum(path.stat().st_size for path in files),
        "manifest": manifest,
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "optimizer_tensors": len(content.optimizer_tensors),
        "random_state": len(content.other_tensors) > len(content.optimizer_tensors),
        "objects": content.objects,
        "loads_in": None if shape is None else _legal_degrees(shape),
        "tensors": {name: dataclasses.asdict(info) for name, info in tensors.items()},
    }
