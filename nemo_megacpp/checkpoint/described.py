"""Layout and model as a checkpoint describes them, read from the objects that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from nemo_megacpp.checkpoint.identity import STRUCTURE
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout


def actual_layout(degrees: Any, ranks: int) -> ParallelLayout:
    """Return the layout of ``degrees``, an object with Megatron's fields, on ``ranks`` ranks."""
    names = [f.name for f in dataclasses.fields(ParallelLayout) if f.name != "world_size"]
    layout = ParallelLayout(**{name: getattr(degrees, name) for name in names})
    return layout if layout.world == ranks else dataclasses.replace(layout, world_size=ranks)


def actual_model(config: HybridConfig, names: Iterable[str]) -> dict[str, Any]:
    """Return the model's fields that a checkpoint records.

    Args:
        config: of the model.
        names: the fields that its recipe gave; those that decide a tensor's shape are added.
    """
    decisive = {*STRUCTURE, "hybrid_pattern", "side_channels"}
    return {name: getattr(config, name) for name in {*names, *decisive}}
