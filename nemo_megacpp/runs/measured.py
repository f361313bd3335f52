"""What a run measured of itself: memory, the first step, and the steps after it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.runs.curves import Curve

_DECILES = 10


@dataclass(frozen=True)
class Measured:
    """The measurements of a run; each is None where the run did not record it.

    Attributes:
        memory, memory_added: peak of the fullest rank, in bytes (of the device's tensors, or of the
            process on a CPU), and the part of it that came after the model's build began.
        first_step: seconds of the run's first step, on the rank that records.
        first_fastest, first_slowest: seconds of the rank that took the least and the most for it.
        step: median seconds of the steps after it; tokens_per_second likewise.
        step_low, step_high: seconds that a tenth of those steps stayed below, and went above.
    """

    memory: float | None
    memory_added: float | None
    first_step: float | None
    first_fastest: float | None
    first_slowest: float | None
    step: float | None
    step_low: float | None
    step_high: float | None
    tokens_per_second: float | None


def measured(curve: Curve) -> Measured:
    """Return what a run measured. The first step also starts everything up: kernels are compiled
    or loaded, communicators are opened, allocators grow."""
    first = curve.steps[min(curve.steps)]
    steady, speeds = _known(curve, "seconds"), _known(curve, "tokens_per_second")
    # Interpolated between two steps; of fewer there is no spread.
    tenths = statistics.quantiles(steady, n=_DECILES, method="inclusive") if steady[1:] else []
    return Measured(
        memory=max(_known(curve, "memory", 0), default=None),
        memory_added=max(_known(curve, "memory_added", 0), default=None),
        first_step=first.get("seconds"),
        first_fastest=first.get("seconds_fastest"),
        first_slowest=first.get("seconds_slowest"),
        step=statistics.median(steady) if steady else None,
        step_low=tenths[0] if tenths else None,
        step_high=tenths[-1] if tenths else None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
    )


def _known(curve: Curve, name: str, skip: int = 1) -> list[Any]:
    """Return the recorded values of ``name``, without those of the first ``skip`` steps."""
    values = (curve.steps[step].get(name) for step in sorted(curve.steps)[skip:])
    return [value for value in values if value is not None]
