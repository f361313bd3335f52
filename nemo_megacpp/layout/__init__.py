"""Parallel layouts: the degrees, who is where, and every reason why a layout is illegal."""

from nemo_megacpp.layout.legality import (
    check_layout,
    describe_nearest,
    describe_violations,
    is_legal,
    nearest_in_any_world,
    nearest_legal,
    padded_vocab_size,
    validate_layout,
)
from nemo_megacpp.layout.parallel import ParallelLayout
from nemo_megacpp.layout.rules import LayoutViolation, ModelShape

__all__ = [
    "LayoutViolation",
    "ModelShape",
    "ParallelLayout",
    "check_layout",
    "describe_nearest",
    "describe_violations",
    "is_legal",
    "nearest_in_any_world",
    "nearest_legal",
    "padded_vocab_size",
    "validate_layout",
]
