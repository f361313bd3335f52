"""The pattern language: a hybrid model's layers written as a string of letters.

``AEMEAEMEAEMR`` is a unit of twelve layers; tiled to 52 it is NAM56R. ``|`` marks a place where the
pipeline may be cut, and ``/`` starts the layers of a multi-token prediction depth. Position ``i``
of a pattern is global layer ``i``, counted from 0. A family that a user adds
(:mod:`nemo_megacpp.families`) brings a letter of its own.
"""

from nemo_megacpp.pattern.family import BUILT_IN, Family, add_family, known_families
from nemo_megacpp.pattern.hybrid_pattern import MAX_DEPTH, HybridPattern
from nemo_megacpp.pattern.text import CUT, MTP, MegatronArgument

__all__ = [
    "BUILT_IN",
    "CUT",
    "MAX_DEPTH",
    "MTP",
    "Family",
    "HybridPattern",
    "MegatronArgument",
    "add_family",
    "known_families",
]
