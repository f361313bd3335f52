"""A run in a few lines, from what it recorded."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_megacpp.render import show_memory, show_seconds
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runs.events import Event, read_events

_STARTS = ("started", "resumed")
_ENDS = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    Attributes:
        status: how the last session ended, or ``not ended``.
        steps: first and last step that is recorded.
        loss: training loss there.
        heldout: step and held-out loss, first and last evaluation; None without one.
        tokens_per_second: median over the steps.
        memory, memory_added: peak of the fullest rank, in bytes, and the part of it that came
            after the model's build began; None if it was not recorded.
        checkpoints: how many were saved.
        seconds: from start to end of the sessions; a killed one counts to its last event.
    """

    status: str
    steps: tuple[int, int]
    loss: tuple[float, float]
    heldout: tuple[tuple[int, float], tuple[int, float]] | None
    tokens_per_second: float
    memory: float | None
    memory_added: float | None
    checkpoints: int
    seconds: float

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values, for people."""
        (first, last), (begin, end) = self.steps, self.loss
        rows = [("steps", f"{first:,} to {last:,}"), ("loss", f"{begin:.4f} → {end:.4f}")]
        if self.heldout is not None:
            (step_a, loss_a), (step_b, loss_b) = self.heldout
            said = f"{loss_a:.4f} (step {step_a:,}) → {loss_b:.4f} (step {step_b:,})"
            rows.append(("held-out loss", said if step_a != step_b else f"{loss_b:.4f}"))
        rows.append(("speed", f"{self.tokens_per_second:,.0f} tokens/s (median)"))
        if self.memory is not None:
            rows.append(("peak memory", f"{show_memory(self.memory)} on the fullest rank"))
        rows.append(("checkpoints saved", f"{self.checkpoints:,}"))
        rows.append(("training time", show_seconds(self.seconds)))
        return rows


def summarize(run_dir: Path) -> Summary | None:
    """Return the summary of a run, None where no step is recorded."""
    curve, events = read_curve(run_dir), read_events(run_dir)
    if not curve.steps:
        return None
    first, last = min(curve.steps), max(curve.steps)
    heldout = sorted(curve.heldout.items())
    return Summary(
        status=_status(events),
        steps=(first, last),
        loss=(_loss(curve, first), _loss(curve, last)),
        heldout=(heldout[0], heldout[-1]) if heldout else None,
        tokens_per_second=statistics.median(
            record["tokens_per_second"] for record in curve.steps.values()
        ),
        memory=max(_known(curve, "memory"), default=None),
        memory_added=max(_known(curve, "memory_added"), default=None),
        checkpoints=sum(event.kind == "checkpoint" for event in events),
        seconds=sum(_sessions(events)),
    )


def _status(events: list[Event]) -> str:
    last = next((e.kind for e in reversed(events) if e.kind in (*_ENDS, *_STARTS)), None)
    return last if last in _ENDS else "not ended"


def _loss(curve: Curve, step: int) -> float:
    value = curve.steps[step]["loss"]
    return float("nan") if value is None else value


def _known(curve: Curve, name: str) -> list[Any]:
    return [record[name] for record in curve.steps.values() if record.get(name) is not None]


def _sessions(events: list[Event]) -> list[float]:
    seconds: list[float] = []
    begun = None
    for event in events:
        if event.kind in _STARTS:
            begun = event.time
            seconds.append(0.0)
        elif begun is not None:
            seconds[-1] = (event.time - begun).total_seconds()
    return seconds
