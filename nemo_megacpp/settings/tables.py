"""The verdicts of all three configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.settings.ddp_verdicts import DDP
from nemo_megacpp.settings.optimizer_verdicts import OPTIMIZER
from nemo_megacpp.settings.transformer import TRANSFORMER
from nemo_megacpp.settings.verdict import Table

TABLES: dict[type, Table] = {
    TransformerConfig: TRANSFORMER,
    DistributedDataParallelConfig: DDP,
    OptimizerConfig: OPTIMIZER,
}
"""Configuration of Megatron -> field -> verdict."""


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a configuration's field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
