"""A training state carried into another layout: what is conserved, and what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step import StepResult


@dataclass
class Carried:
    """A training state and the steps that follow it, on rank 0.

    Attributes:
        state: every weight, buffer, moment and master weight in global shape, by checkpoint key.
        steps: the number of steps that the optimizer of each rank knows of.
        settings: the parameter groups' settings.
        following: what the training steps after it gave.
    """

    state: GlobalValues
    steps: int
    settings: list[dict] = field(default_factory=list)
    following: StepResult | None = None


def checkpoint_of(run_dir: str, step: int) -> str:
    """Return the path of a run's checkpoint of ``step``."""
    return str(Path(run_dir) / "checkpoints" / f"step={step}")
