"""What every door asks: is each setting one that may be trained with?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.errors import raise_violations
from nemo_megacpp.settings.tables import TABLES, default_of
from nemo_megacpp.settings.verdict import Setting


def setting_violations(kind: type, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that are neither proved nor neutral, one without a verdict included: with the
    value, the reason and the legal values.

    Args:
        kind: Megatron's configuration: a key of :data:`nemo_megacpp.settings.tables.TABLES`.
        values: its fields; one that is missing is at its default.
    """
    for field in dataclasses.fields(kind):
        default = default_of(field)
        value = values.get(field.name, default)
        setting = TABLES[kind].get(field.name)
        name = field.name if kind is TransformerConfig else f"{kind.__name__}.{field.name}"
        if setting is None:
            if value != default and (value or default):
                yield (
                    f"{kind.__name__}.{field.name}={value!r}: this Megatron-Core has a setting "
                    f"that nemo_megacpp does not know. Legal: {default!r}."
                )
        elif not setting.accepts(value, default):
            reason = setting.otherwise or setting.reason
            yield f"{name}={value!r}: {reason}. Legal: {_legal(setting, default)}."


def validate_settings(kind: type, values: Mapping[str, Any]) -> None:
    """Validate all settings of a configuration, by :func:`setting_violations`.

    Raises:
        UserError: for all that are neither proved nor neutral.
    """
    raise_violations(setting_violations(kind, values))


def validate_ddp(config: DistributedDataParallelConfig) -> None:
    """Validate the data-parallel wrapper, by :func:`validate_settings`."""
    validate_settings(DistributedDataParallelConfig, vars(config))


def validate_optimizer(config: OptimizerConfig) -> None:
    """Validate the optimizer, by :func:`validate_settings`."""
    validate_settings(OptimizerConfig, vars(config))


def legal_values(setting: Setting, default: Any) -> list[Any]:
    """Return the values that a setting with a few legal ones accepts."""
    values = [] if setting.legal is None else list(setting.legal)
    said = any(value in (default, str(default)) for value in values)
    unsaid = not said and setting.accepts(default, default)
    return [*values, default] if unsaid else values


def _legal(setting: Setting, default: Any) -> str:
    text = ", ".join(map(repr, legal_values(setting, default)))
    return f"{text}, or a list of these" if setting.each else text
