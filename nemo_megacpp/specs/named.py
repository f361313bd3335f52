"""Names for ``--spec nemo_megacpp.specs NAME``, which carry what Megatron has no option for.

Megatron's scripts find a spec by module and name, and hand it a plain ``TransformerConfig``. The
mode and the settings of our mixers therefore travel in the name::

    hybrid_stack_spec
    hybrid_mamba3_stack_spec(mamba3_mimo_rank=4,m2rnn_clip_order=after_output)
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from typing import Any

import yaml

from nemo_megacpp.config import HybridConfig, m2rnn_dimensions
from nemo_megacpp.errors import UserError, nearest
from nemo_megacpp.hybrid_fields import Mode
from nemo_megacpp.pattern import Family
from nemo_megacpp.values import read_value

SPEC_MODULE = "nemo_megacpp.specs"
MODES: dict[str, Mode] = {
    "hybrid_stack_spec": "nemo_native",
    "hybrid_mamba3_stack_spec": "mamba3",
}
_WITH_SETTINGS = re.compile(r"(\w+)\((.*)\)")


@cache
def carried_fields() -> dict[str, Any]:
    """Return the fields of :class:`HybridConfig` that a name carries, with their defaults."""
    return {
        field.name: field.default
        for field in dataclasses.fields(HybridConfig)
        if field.name.startswith(("m2rnn_", "mamba3_"))
    }


def spec_name(config: HybridConfig) -> str:
    """Return the name under which a plain configuration becomes the model of ``config``."""
    name = next(name for name, mode in MODES.items() if mode == config.mode)
    families = config.pattern.families
    prefixes = ("m2rnn_",) * (Family.RECURRENT in families)
    prefixes += ("mamba3_",) * (config.mode == "mamba3" and Family.MAMBA in families)
    settings = {
        field: value
        for field, default in carried_fields().items()
        if field.startswith(prefixes) and (value := getattr(config, field)) != default
    }
    if m2rnn_dimensions(config).num_heads * config.m2rnn_value_head_dim == config.hidden_size:
        settings.pop("m2rnn_num_heads", None)  # a plain configuration has as many
    if not settings:
        return name
    return f"{name}({','.join(f'{key}={_word(value)}' for key, value in settings.items())})"


def read_spec_name(name: str) -> tuple[Mode, dict[str, Any]]:
    """Return the mode and the settings that a name carries.

    Raises:
        UserError: an unknown name or setting, a value of the wrong type, or a setting of the other
            mode.
    """
    match = _WITH_SETTINGS.fullmatch(name)
    base, text = (match[1], match[2]) if match else (name, "")
    if base not in MODES:
        raise UserError(f"There is no spec {name!r}.{nearest(base, MODES)}")
    settings: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = entry.partition("=")
        if not separator:
            raise UserError(f"{entry!r} in spec {name!r} is not name=value.")
        if key not in carried_fields():
            raise UserError(
                f"Spec {name!r} cannot carry {key!r}.{nearest(key, carried_fields())} It carries "
                f"what Megatron has no option for: {', '.join(carried_fields())}."
            )
        if key.startswith("mamba3_") and MODES[base] != "mamba3":
            raise UserError(f"Spec {name!r}: {key} is a setting of hybrid_mamba3_stack_spec.")
        settings[key] = read_value(HybridConfig, key, yaml.safe_load(value))
    return MODES[base], settings


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
