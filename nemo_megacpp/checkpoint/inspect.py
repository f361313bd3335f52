"""``nemo-megacpp checkpoint inspect``: what a checkpoint is, and what can load it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.identity import Identity, saved_model
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ModelShape, ParallelLayout, check_layout

_AXES = ("tp", "cp", "pp", "ep", "etp")
_LARGEST_DEGREE = 64


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
            if not check_layout(ParallelLayout.parse(f"{axis}={degree}"), shape)
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
    shape = None if identity is None else saved_shape(content.directory, identity)
    try:
        manifest = check_manifest(content.directory, full=False)
    except UserError as damage:
        manifest = f"damaged: {damage}"
    tensors = content.model_tensors
    files = [path for path in content.directory.rglob("*") if path.is_file()]
    return {
        "checkpoint": str(content.directory),
        "step": content.step,
        "model": None if identity is None else identity["model"],
        "pattern": None if shape is None else shape.pattern.letters,
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
