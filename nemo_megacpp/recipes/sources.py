"""The ``data`` setting of a recipe: one folder of prepared data, or a blend of several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.printable import shown
from nemo_megacpp.recipes.names import validate_path

Sources = str | dict[str, float | None]
"""A folder, or weights by folder: all numbers, or all None (in proportion to the tokens)."""


def read_sources(value: Any) -> Sources | None:
    """Read the ``data`` of a recipe: a folder, a list, or weights by folder.

    In a list, or in one string such as ``0.7 code 0.3 prose``, a weight may stand before each
    folder, as in Megatron's ``--data-path`` and NeMo's ``paths``.

    Raises:
        UserError: an empty blend, a folder given twice, a weight that is not a positive number or
            that is also the name of a folder.
    """
    if isinstance(value, str) and len(value.split()) > 1 and not Path(value).exists():
        value = value.split()
    if isinstance(value, list):
        value = _read_list(value)
    if not isinstance(value, dict | str | None):
        raise UserError(
            f"data: {shown(value)} is neither a folder nor a blend. If it is the name of a "
            f"folder, put it in quotes."
        )
    if not isinstance(value, dict):
        return value if value is None else validate_path("data", value)
    if not value:
        raise UserError("data is an empty blend; name at least one folder, or leave it out.")
    blend = {_folder(folder): _weight(str(folder), weight) for folder, weight in value.items()}
    without = [folder for folder, weight in blend.items() if weight is None]
    if 0 < len(without) < len(blend):
        raise UserError(
            f"data: {', '.join(without)} has no weight, others have one. Give every folder a "
            f"weight, or none to weight them by their tokens."
        )
    return blend


def _read_list(items: list[Any]) -> dict[str, Any]:
    weighted = bool(items) and _number(items[0]) is not None
    if weighted and len(items) % 2:
        raise UserError(f"data: {items[-1]} has no partner; write a weight before each folder.")
    for item in items[::2] if weighted else ():
        if Path(str(item)).is_dir():
            raise UserError(
                f"data: {item} is in the place of a weight and is also a folder. Write ./{item} "
                f"for the folder, or give weights by folder: {{FOLDER: 0.7, …}}."
            )
    weights = [_number(item) or item for item in items[::2]] if weighted else [None] * len(items)
    folders = [_folder(folder) for folder in (items[1::2] if weighted else items)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"data names {folder} twice; give it a weight instead.")
    return dict(zip(folders, weights, strict=True))


def _folder(name: Any) -> str:
    if name is None or not str(name).strip():
        raise UserError("data has a folder without a name; leave it out of the blend.")
    if isinstance(name, list | tuple | dict | set):
        raise UserError(f"data: {shown(name)} is not the name of a folder.")
    return validate_path("data", str(name))


def _number(item: Any) -> float | None:
    try:
        return float(item)
    except (TypeError, ValueError, OverflowError):
        return None


def _weight(folder: str, weight: Any) -> float | None:
    if weight is None:
        return None
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise UserError(
            f"data: {folder} has the weight {shown(weight)}; it must be a positive number."
        )
    return float(weight)
