"""Whether a run can go on from a checkpoint: what it holds, and what is left to train."""

from __future__ import annotations

from pathlib import Path

from nemo_megacpp.errors import UserError


def refuse_finished(
    checkpoint: Path, step: int | None, max_steps: int, stop_after: int | None = None
) -> None:
    """Refuse to resume where no step is left to train.

    Args:
        checkpoint: to resume from, for the message.
        step: of the checkpoint; None where it does not say.
        max_steps: of the run, counted from the start of the first one.
        stop_after: of the run.

    Raises:
        UserError: with both numbers.
    """
    if step is None:
        return
    if step == max_steps:
        raise UserError(
            f"The run is complete: {checkpoint} is of step {step}, and max_steps={max_steps}. To "
            f"train on, give a larger max_steps, which counts from the first step of all."
        )
    if step > max_steps:
        raise UserError(
            f"{checkpoint} is of step {step}, which is past the end of the run, max_steps="
            f"{max_steps}. To train on, give a larger max_steps, which counts from the first step "
            f"of all."
        )
    if stop_after is not None and stop_after <= step:
        raise UserError(
            f"stop_after: {stop_after} is not past step {step}, from which {checkpoint} goes on. "
            f"Give a larger stop_after, or leave it out."
        )


def refuse_weights_alone(checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint that has no optimizer state, as ``import`` makes them.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    from nemo_megacpp.checkpoint.content import CheckpointContent

    content = CheckpointContent(checkpoint)
    if content.tensors and not content.optimizer_tensors:
        raise UserError(
            f"{checkpoint} holds the weights alone, and resume needs the optimizer's state too. "
            f"Give a checkpoint that a run has saved."
        )
