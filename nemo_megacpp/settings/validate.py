"""Validation that every entry point runs: may each setting be trained with?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.errors import raise_violations
from nemo_megacpp.settings.training_verdicts import DDP, OPTIMIZER
from nemo_megacpp.settings.transformer_verdicts import TRANSFORMER
from nemo_megacpp.settings.verdict import Setting, Table

ALL_RELEASES: dict[type, Table] = {
    TransformerConfig: TRANSFORMER,
    DistributedDataParallelConfig: DDP,
    OptimizerConfig: OPTIMIZER,
}
"""Configuration of Megatron -> field of any supported release -> verdict."""

TABLES: dict[type, Table] = {
    kind: {f.name: table[f.name] for f in dataclasses.fields(kind) if f.name in table}
    for kind, table in ALL_RELEASES.items()
}
"""Configuration of Megatron -> field of the installed release -> verdict."""


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a configuration's field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def setting_violations(kind: type, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that are neither proved nor neutral (those without a verdict, too), with the
    value, the reason and the legal values.

    Args:
        kind: a key of :data:`TABLES`.
        values: fields of that configuration; missing ones are at their defaults.
    """
    for field in dataclasses.fields(kind):
        default = default_of(field)
        value = values.get(field.name, default)
        setting = TABLES[kind].get(field.name)
        name = field.name if kind is TransformerConfig else f"{kind.__name__}.{field.name}"
        if setting is None:
            if value != default and (value or default):
                yield (
                    f"{kind.__name__}.{field.name}={value!r}: nemo_megacpp does not know this "
                    f"setting of the installed Megatron-Core. Legal: {default!r}."
                )
        elif not setting.accepts(value, default):
            reason = setting.otherwise or setting.reason
            legal = ", ".join(map(repr, legal_values(setting, default)))
            lists = ", or a list of these" if setting.each else ""
            yield f"{name}={value!r}: {reason}. Legal: {legal}{lists}."


def validate_config(config: DistributedDataParallelConfig | OptimizerConfig) -> None:
    """Validate all settings of a data-parallel wrapper or an optimizer.

    Raises:
        UserError: a setting is neither proved nor neutral.
    """
    kind = next(kind for kind in TABLES if isinstance(config, kind))
    raise_violations(setting_violations(kind, vars(config)))


def legal_values(setting: Setting, default: Any) -> list[Any]:
    """Return the values that a setting with a few legal ones accepts."""
    values = list(setting.legal or ())
    listed = any(value in (default, str(default)) for value in values)
    return values if listed or not setting.accepts(default, default) else [*values, default]
