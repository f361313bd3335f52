"""``nemo-megacpp checkpoint inspect``: what a checkpoint is, and what can load it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout, check_layout
from nemo_megacpp.pattern import HybridPattern

_AXES = ("tp", "cp", "pp", "ep", "etp")
_LARGEST_DEGREE = 64


class _Shape:
    """A saved model's sizes as the layout rules read them; a checkpoint knows no batches."""

    micro_batch_size = None
    global_batch_size = None

    def __init__(self, model: dict[str, Any]):
        from nemo_megacpp.config import HybridConfig

        for field in dataclasses.fields(HybridConfig):
            setattr(self, field.name, model.get(field.name, field.default))
        self.pattern = HybridPattern.parse(model["hybrid_pattern"], depth=model.get("num_layers"))


def validate_target_layout(model: dict[str, Any], layout: ParallelLayout) -> None:
    """Refuse a layout that a saved model cannot be loaded in, with every reason."""
    from nemo_megacpp.layout import validate_layout

    validate_layout(layout, _Shape(model))  # type: ignore[arg-type]


def legal_degrees(model: dict[str, Any]) -> dict[str, list[int]]:
    """Return the degrees of each axis, up to 64, that load the model with all other axes at 1."""
    shape: Any = _Shape(model)
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
    model = None if identity is None else identity["model"]
    try:
        manifest = str(check_manifest(content.directory, full=False))
    except UserError as damage:
        manifest = f"damaged: {damage}"
    tensors = content.model_tensors
    return {
        "checkpoint": str(content.directory),
        "step": content.step,
        "model": model,
        "pattern": None if model is None else _pattern(model),
        "layout": None if identity is None else identity.get("layout"),
        "tokenizer": None if identity is None else identity["tokenizer"],
        "bytes": content.size,
        "manifest": manifest,
        "parameters": sum(_count(info.shape) for info in tensors.values()),
        "optimizer_tensors": len(content.optimizer_tensors),
        "random_state": len(content.other_tensors) > len(content.optimizer_tensors),
        "objects": content.objects,
        "loads_in": None if model is None else legal_degrees(model),
        "tensors": {name: dataclasses.asdict(info) for name, info in tensors.items()},
    }


def _pattern(model: dict[str, Any]) -> str:
    return HybridPattern.parse(model["hybrid_pattern"], depth=model.get("num_layers")).letters


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
