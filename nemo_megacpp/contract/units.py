"""Bytes as people write them."""

from __future__ import annotations

import re

from nemo_megacpp.errors import UserError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_LEAST, _MOST = 10**9, 10**12


def show_bytes(size: float) -> str:
    """Return ``1.23 GB`` (powers of 1000), with three digits."""
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5 or unit == "PB":
            break
        size /= 1000
    digits = 0 if unit == "B" or size >= 99.95 else (1 if size >= 9.995 else 2)
    return f"{size:.{digits}f} {unit}"


def read_gpu_memory(text: str) -> int:
    """Read the memory of a GPU, such as ``141GB`` or ``80GiB``.

    Raises:
        UserError: no size with a unit, or one that no GPU has.
    """
    match = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items() if unit not in ("", "B")}
    if match is None or match[2].lower() not in units:
        raise UserError(
            f"{text!r} is not a memory size. Write a number with a unit, for example 80GB (H100), "
            f"141GB (H200) or 192GB (B200); GiB counts in powers of 1024."
        )
    size = round(float(match[1]) * units[match[2].lower()])
    if not _LEAST <= size <= _MOST:
        raise UserError(
            f"{text} is the memory of no GPU: give that of one rank, between 1GB and 1TB."
        )
    return size
