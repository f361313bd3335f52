"""A run in a few lines, from what it recorded."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.render import show_memory, show_seconds
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runs.events import Event, read_events
from nemo_megacpp.runs.run_folder import SUMMARY_FILE

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
        tokens_per_second: of the job, median over the steps.
        tflops_per_rank: model TFLOP/s of a rank, which is a GPU; None if it was not recorded.
        mfu: model FLOPs utilization, 0 to 1; None where the peak of the GPU is not known.
        memory, memory_added: peak of the fullest rank, in bytes, and the part of it that came
            after the model's build began; None if it was not recorded.
        checkpoints: how many were saved.
        seconds: from start to end of training, of all sessions; a killed one counts to its last
            event.
        startup_seconds: before training, of all sessions that recorded it.
    """

    status: str
    steps: tuple[int, int]
    loss: tuple[float, float]
    heldout: tuple[tuple[int, float], tuple[int, float]] | None
    tokens_per_second: float
    tflops_per_rank: float | None
    mfu: float | None
    memory: float | None
    memory_added: float | None
    checkpoints: int
    seconds: float
    startup_seconds: float

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values, for people."""
        (first, last), (begin, end) = self.steps, self.loss
        rows = [("steps", f"{first:,} to {last:,}"), ("loss", f"{begin:.4f} → {end:.4f}")]
        if self.heldout is not None:
            (step_a, loss_a), (step_b, loss_b) = self.heldout
            said = f"{loss_a:.4f} (step {step_a:,}) → {loss_b:.4f} (step {step_b:,})"
            rows.append(("held-out loss", said if step_a != step_b else f"{loss_b:.4f}"))
        rows.append(("speed (medians)", ", ".join(show_speed(vars(self)))))
        if self.memory is not None:
            rows.append(("peak memory", f"{show_memory(self.memory)} on the fullest rank"))
        rows.append(("checkpoints saved", f"{self.checkpoints:,}"))
        startup = self.startup_seconds and f" (start-up {show_seconds(self.startup_seconds)})"
        rows.append(("time", f"training {show_seconds(self.seconds)}{startup or ''}"))
        return rows


def show_step(record: Mapping[str, Any], max_steps: int, heldout: float | None, unit: str) -> str:
    """Return the line of progress of a step.

    Args:
        record: of the step, as ``metrics.jsonl`` has it, with ``memory``.
        max_steps: of the run.
        heldout: the last held-out loss, None before the first evaluation.
        unit: what a rank is: ``GPU`` or ``rank``.
    """
    parts = [f"step {record['step']:>5}/{max_steps}", f"loss {record['loss']:.4f}"]
    if heldout is not None:
        parts.append(f"held-out {heldout:.4f}")
    parts += [f"{name} {value:.3f}" for name, value in record["aux"].items()]
    parts += [f"grad norm {record['grad_norm'] or 0.0:.3f}"]
    parts += show_speed(record, unit)
    parts += [f"{record['seconds']:.2f} s", show_memory(record["memory"])]
    return "  ".join(parts)


def show_speed(record: Mapping[str, Any], unit: str = "rank") -> list[str]:
    """Return the speeds that a step or a summary records, as phrases.

    Args:
        record: with ``tokens_per_second``, ``tflops_per_rank``, ``mfu``; each None or left out if
            not known.
        unit: what a rank is: ``GPU`` or ``rank``.
    """
    phrases = [f"{record['tokens_per_second']:,.0f} tokens/s"]
    if (tflops := record.get("tflops_per_rank")) is not None:
        size, scale = (1, "T") if tflops >= 0.1 else (1000, "G")
        phrases.append(
            f"{tflops * size:.{0 if tflops * size >= 100 else 1}f} {scale}FLOP/s per {unit}"
        )
    if (mfu := record.get("mfu")) is not None:
        phrases.append(f"MFU {mfu:.1%}")
    return phrases


def summarize(run_dir: Path) -> Summary | None:
    """Return the summary of a run, None where no step is recorded."""
    curve, events = read_curve(run_dir), read_events(run_dir)
    if not curve.steps:
        return None
    first, last = min(curve.steps), max(curve.steps)
    heldout = sorted(curve.heldout.items())
    starts = [event for event in events if event.kind in _STARTS]
    return Summary(
        status=_status(events),
        steps=(first, last),
        loss=(_loss(curve, first), _loss(curve, last)),
        heldout=(heldout[0], heldout[-1]) if heldout else None,
        tokens_per_second=statistics.median(_known(curve, "tokens_per_second")),
        tflops_per_rank=_median(curve, "tflops_per_rank"),
        mfu=_median(curve, "mfu"),
        memory=max(_known(curve, "memory"), default=None),
        memory_added=max(_known(curve, "memory_added"), default=None),
        checkpoints=sum(event.kind == "checkpoint" for event in events),
        seconds=_training_seconds(events),
        startup_seconds=sum(event.details.get("startup_seconds", 0) for event in starts),
    )


def write_summary(summary: Summary, run_dir: Path) -> None:
    """Write ``record/summary.json``: the fields of :class:`Summary`.

    Raises:
        UserError: the file cannot be written.
    """
    path = run_dir / SUMMARY_FILE
    try:
        path.write_text(json.dumps(dataclasses.asdict(summary), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def _status(events: list[Event]) -> str:
    last = next((e.kind for e in reversed(events) if e.kind in (*_ENDS, *_STARTS)), None)
    return last if last in _ENDS else "not ended"


def _loss(curve: Curve, step: int) -> float:
    value = curve.steps[step]["loss"]
    return float("nan") if value is None else value


def _known(curve: Curve, name: str) -> list[Any]:
    return [record[name] for record in curve.steps.values() if record.get(name) is not None]


def _median(curve: Curve, name: str) -> float | None:
    known = _known(curve, name)
    return statistics.median(known) if known else None


def _training_seconds(events: list[Event]) -> float:
    seconds: list[float] = []
    begun = None
    for event in events:
        if event.kind in _STARTS:
            begun = event.time
            seconds.append(0.0)
        elif begun is not None:
            seconds[-1] = (event.time - begun).total_seconds()
    return sum(seconds)
