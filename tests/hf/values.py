"""Checkpoints compared bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_megacpp.checkpoint.content import CheckpointContent


def values(path: Path) -> dict[str, torch.Tensor]:
    content = CheckpointContent(path)
    return {name: content.read_tensor(name) for name in content.tensors}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
