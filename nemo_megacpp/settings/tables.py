"""The verdicts of all three configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.settings.architecture import ARCHITECTURE
from nemo_megacpp.settings.ddp import DDP
from nemo_megacpp.settings.experts import EXPERTS
from nemo_megacpp.settings.kernels import KERNELS
from nemo_megacpp.settings.optimizer import OPTIMIZER
from nemo_megacpp.settings.parallelism import PARALLELISM
from nemo_megacpp.settings.verdict import Table

TABLES: dict[type, Table] = {
    TransformerConfig: {**PARALLELISM, **ARCHITECTURE, **EXPERTS, **KERNELS},
    DistributedDataParallelConfig: DDP,
    OptimizerConfig: OPTIMIZER,
}
"""Configuration of Megatron -> field -> verdict."""


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a configuration's field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
