"""A training state carried into another layout: what is conserved, and what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_megacpp.checkpoint.training_state import (
    load_training_state,
    save_training_state,
    training_sharded_state_dict,
)
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather import GlobalValues, gather_sharded
from nemo_megacpp.proof.step import StepResult, StepSpec, Trainee, disturb, prepare, take_step


@dataclass
class Carried:
    """A training state and the step that follows it, on rank 0.

    Attributes:
        state: every weight, buffer, moment and master weight in global shape, by checkpoint key.
        steps: the number of steps that the optimizer of each rank knows of.
        settings: the parameter groups' settings.
        next_step: what one more training step gave.
    """

    state: GlobalValues
    steps: int
    settings: list[dict] = field(default_factory=list)
    next_step: StepResult | None = None


def save_after_steps(
    spec: StepSpec, layout: ParallelLayout, directory: str, steps: int = 1
) -> Carried | None:
    """Run ``steps`` steps, save the training state to ``directory``, run the next step."""
    trainee = prepare(spec, layout)
    disturb(spec, trainee.chunks)
    for _ in range(steps):
        take_step(trainee)
    save_training_state(trainee.chunks, trainee.optimizer, directory)
    return _carry_on(trainee)


def load_and_step(spec: StepSpec, layout: ParallelLayout, directory: str) -> Carried | None:
    """Load the training state in ``directory``, run the next step."""
    trainee = prepare(spec, layout)
    load_training_state(trainee.chunks, trainee.optimizer, directory)
    return _carry_on(trainee)


def _carry_on(trainee: Trainee) -> Carried | None:
    state = training_sharded_state_dict(trainee.chunks, trainee.optimizer)
    optimizer = state["optimizer"]
    values = gather_sharded(state)
    following = take_step(trainee)
    if values is None:
        return None
    return Carried(values, optimizer["step"], optimizer["param_groups"], following)
