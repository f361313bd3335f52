"""The end of a run because of NaN or Inf."""

from __future__ import annotations

import re

from nemo_megacpp.errors import UserError

_FOUND = re.compile(r"^Rank (\d+), .*found (NaN|Inf) in local grad norm", re.DOTALL)
"""The message of Megatron's ``check_for_nan_in_grad`` (``rerun_state_machine.py``)."""


def non_finite(step: int, what: str) -> UserError:
    """Return the error of a run that ends because of NaN or Inf."""
    return UserError(
        f"Step {step}: {what}. The run stops and saves nothing of this step. Resume an earlier "
        f"checkpoint with a lower lr, or without the data of this step."
    )


def non_finite_gradient(step: int, error: RuntimeError) -> UserError | None:
    """Return the error of a run whose gradient Megatron has found to be NaN or Inf, before it is
    reduced and on the rank that has it; None for any other error."""
    if (found := _FOUND.match(str(error))) is None:
        return None
    rank, value = found.groups()
    return non_finite(step, f"the gradient is {value} on rank {rank}")
