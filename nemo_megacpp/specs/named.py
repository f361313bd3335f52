"""Names for ``--spec nemo_megacpp.specs NAME``, with settings that Megatron has no option for.

Megatron's scripts load a spec by module and name, and build it with a plain ``TransformerConfig``,
so the mode and the mixers' settings are part of the name::

    hybrid_stack_spec
    hybrid_mamba3_stack_spec(mamba3_mimo_rank=4,m2rnn_clip_order=after_output)
    hybrid_stack_spec(hybrid_pattern=AEM|R)

From 0.18 on Megatron validates the letters of the pattern itself and shows a stack only the layers
of its stage, so the pattern of the whole model is in the name too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import yaml

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError, nearest
from nemo_megacpp.hybrid_fields import HybridFields, Mode
from nemo_megacpp.mixer_settings import M2RNNSettings, Mamba3Settings
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.printable import shown
from nemo_megacpp.values import read_value
from nemo_megacpp.yaml_files import parse_yaml, reason

SPEC_MODULE = "nemo_megacpp.specs"
MODES: dict[str, Mode] = {"hybrid_stack_spec": "nemo_native", "hybrid_mamba3_stack_spec": "mamba3"}
_WITH_SETTINGS = re.compile(r"(\w+)\((.*)\)")


CARRIED = (
    "hybrid_pattern",
    *(
        kind.prefix + field.name
        for kind in (M2RNNSettings, Mamba3Settings)
        for field in dataclasses.fields(kind)
    ),
)
"""The hybrid fields that a name carries."""


def spec_name(config: HybridConfig, pattern: str | None = None) -> str:
    """Return the name under which a plain configuration becomes the model of ``config``.

    Args:
        config: the model.
        pattern: the pattern that the name carries; None where the script gives it to the stack.
    """
    name = next(name for name, mode in MODES.items() if mode == config.mode)
    families, defaults = config.pattern.all_families, HybridFields()
    prefixes = ("m2rnn_",) * (Family.RECURRENT in families)
    prefixes += ("mamba3_",) * (config.mode == "mamba3" and Family.MAMBA in families)
    settings: dict[str, Any] = {} if pattern is None else {"hybrid_pattern": pattern}
    settings |= {
        field: value
        for field in CARRIED
        if field.startswith(prefixes)
        and (value := getattr(config, field)) != getattr(defaults, field)
    }
    if int(config.m2rnn_num_heads or 0) * config.m2rnn_value_head_dim == config.hidden_size:
        settings.pop("m2rnn_num_heads", None)  # the default of a plain configuration
    if not settings:
        return name
    return f"{name}({','.join(f'{key}={_word(value)}' for key, value in settings.items())})"


def read_spec_name(name: str) -> HybridFields:
    """Return the fields that a name carries: the mode, the pattern, settings of our mixers.

    Raises:
        UserError: an unknown name or setting, a value of the wrong type, or a setting of the other
            mode.
    """
    match = _WITH_SETTINGS.fullmatch(name)
    base, text = (match[1], match[2]) if match else (name, "")
    if base not in MODES:
        raise UserError(f"There is no spec {shown(name)}.{nearest(base, MODES)}")
    settings: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = entry.partition("=")
        if not separator:
            raise UserError(f"{shown(entry)} in spec {shown(name)} is not name=value.")
        if key not in CARRIED:
            raise UserError(
                f"Spec {shown(name)} cannot carry {shown(key)}.{nearest(key, CARRIED)} It carries "
                f"what Megatron has no option for: {', '.join(CARRIED)}."
            )
        if key.startswith("mamba3_") and MODES[base] != "mamba3":
            raise UserError(f"Spec {shown(name)}: {key} is a setting of hybrid_mamba3_stack_spec.")
        try:
            if key == "hybrid_pattern":
                settings[key] = str(HybridPattern.parse(value))
                continue
            settings[key] = read_value(HybridConfig, key, parse_yaml(value)[0])
        except (UserError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"Spec {shown(name)}: {key}: {reason(error)}") from None
    return HybridFields(mode=MODES[base], **settings)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
