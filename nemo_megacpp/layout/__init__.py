"""Parallel layouts: the degrees, who is where, and every reason why a layout is illegal."""

from nemo_megacpp.layout.legality import (
    Violation,
    check_layout,
    is_legal,
    padded_vocab_size,
    validate_layout,
)
from nemo_megacpp.layout.nearest import nearest_legal
from nemo_megacpp.layout.parallel import AXES, ParallelLayout, RankCoordinates
from nemo_megacpp.layout.shape import ModelShape

__all__ = [
    "AXES",
    "ModelShape",
    "ParallelLayout",
    "RankCoordinates",
    "Violation",
    "check_layout",
    "is_legal",
    "nearest_legal",
    "padded_vocab_size",
    "validate_layout",
]
