"""What two environments with different releases of Megatron-Core exchange, and tell each other."""

from __future__ import annotations

from typing import NamedTuple

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import Carried
from nemo_megacpp.proof.step_spec import StepSpec

SPEC = StepSpec(tiny_model("AEM|RF"), steps=2, use_distributed_optimizer=True)
SAVED_IN, LOADED_IN = ParallelLayout.parse("tp=2,etp=1"), ParallelLayout.parse("pp=2")


class Told(NamedTuple):
    """What the other environment found.

    Attributes:
        release: its Megatron-Core.
        saved: what it saved after the first step, and its second step.
        loaded: what it loaded from the caller's checkpoint, and the second step from there.
    """

    release: str
    saved: Carried
    loaded: Carried
