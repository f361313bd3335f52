"""The end of a run because of NaN or Inf."""

from __future__ import annotations

from nemo_megacpp.errors import UserError


def non_finite(step: int, what: str) -> UserError:
    """Return the error of a run that ends because of NaN or Inf."""
    return UserError(
        f"Step {step}: {what}. The run stops and saves nothing of this step. Resume an earlier "
        f"checkpoint with a lower lr, or without the data of this step."
    )
