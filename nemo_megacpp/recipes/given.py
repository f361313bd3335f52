"""The settings that a user gives, under the names as written: YAML files, command lines."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import read_limited
from nemo_megacpp.layout.parallel import read_degrees, validate_given_once
from nemo_megacpp.printable import shown
from nemo_megacpp.recipes.names import TEXTS, full_name, validate_not_empty
from nemo_megacpp.yaml_files import LIMIT, parse_yaml, reason


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings of a recipe's file, by the names that were written.

    Raises:
        UserError: the file cannot be read, holds something else, or has a key twice or without a
            value.
    """
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    content = read_limited(path, LIMIT)
    try:
        settings, lines = parse_yaml(content.decode())
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except (ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, an impossible date
        raise UserError(f"{path} cannot be read as YAML: {reason(error)}") from None
    if not (isinstance(settings, dict) and isinstance(lines, yaml.MappingNode)):
        found = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise UserError(f"{path} must hold key: value lines; it holds {found}.")
    for key, value in lines.value:
        # YAML reads a key without a value as null; here null must be written.
        if isinstance(value, yaml.ScalarNode) and not value.value and value.style is None:
            validate_not_empty(full_name(key.value), key.value, "")
    return settings


def read_command_line(
    overrides: Iterable[str], layout: str | None = None, world_size: str | None = None
) -> dict[str, Any]:
    """Return the settings of a command line, by the names that were written.

    Args:
        overrides: ``key=value`` words; values are read as YAML.
        layout: of ``--layout``, ``tp=2,cp=2``: the same degrees in one word.
        world_size: of ``--world-size``.

    Raises:
        UserError: a word is not ``key=value``, a key is unknown, a setting is given twice under any
            of its names, or a value is missing or not YAML.
    """
    settings: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        key = key.strip()
        if not separator or not key:
            raise UserError(f"{shown(override)} is not a setting: write key=value.")
        name = full_name(key)
        validate_not_empty(name, key, value)
        validate_given_once(name, override, spelled)
        settings[key] = _read(name, key, value)
    for key, value in ({} if layout is None else read_degrees(layout)).items():
        validate_given_once(full_name(key), f"{key}={value} of --layout", spelled)
        settings[key] = value
    if world_size is not None:
        validate_given_once("world_size", f"--world-size {world_size}", spelled)
        settings["world_size"] = world_size
    return settings


def _read(name: str, key: str, value: str) -> Any:
    try:
        read, _ = parse_yaml(value)
        if isinstance(read, list | dict):
            _validate_no_gaps(key, value)
    except UserError as error:
        raise UserError(f"{key} {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        if name not in TEXTS:
            raise UserError(
                f"{key}: cannot read {shown(value)} as a YAML value: {reason(error)}"
            ) from None
        return value
    # A name is taken as typed, although YAML reads 0123 as the number 83.
    return value if name in TEXTS and not isinstance(read, str | None) else read


def _validate_no_gaps(key: str, value: str) -> None:
    """Refuse ``[one, $UNSET]``, which YAML reads as ``[one]``."""
    tokens = list(yaml.scan(value, Loader=yaml.SafeLoader))
    ends = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
    for token, after in itertools.pairwise(tokens):
        if isinstance(token, yaml.FlowEntryToken) and isinstance(after, ends):
            raise UserError(f"has nothing after the last comma of {shown(value)}.")
