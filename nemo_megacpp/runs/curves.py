"""The recorded metrics of runs, and plots of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict

from nemo_megacpp.json_files import Count, Text
from nemo_megacpp.runs.events import read_records
from nemo_megacpp.runs.run_folder import METRICS_FILE


class _Record(TypedDict, total=False):
    """A line of the metrics: a training step, or an evaluation."""

    step: Required[Count]
    loss: float | None
    heldout_loss: float
    grad_norm: float | None
    lr: float | None
    seconds: float
    seconds_fastest: float
    seconds_slowest: float
    tokens_per_second: float
    tflops_per_rank: float | None
    mfu: float | None
    memory: float
    memory_added: float
    aux: dict[Text, float]


@dataclass(frozen=True)
class Curve:
    """The metrics of one run.

    Attributes:
        steps: one record per training step, by step.
        heldout: held-out loss by step.
    """

    steps: dict[int, dict[str, Any]]
    heldout: dict[int, float]

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {step: record["loss"] for step, record in self.steps.items()}


def read_curve(run_dir: Path) -> Curve:
    """Read the metrics of a run; of a step recorded twice, the later record counts.

    Raises:
        UserError: the file is damaged.
    """
    steps: dict[int, dict[str, Any]] = {}
    heldout: dict[int, float] = {}
    for record in read_records(run_dir / METRICS_FILE, _Record):
        if "heldout_loss" in record:
            heldout[record["step"]] = record["heldout_loss"]
        else:
            steps[record["step"]] = dict(record)
    return Curve(steps, heldout)


def draw_phases(phases: list[tuple[str, Curve]], resumed_at: int, path: Path) -> None:
    """Plot training and held-out loss of consecutive runs, as PNG.

    Args:
        phases: label and curve of each run.
        resumed_at: step of the checkpoint that the second run resumed.
        path: PNG to write.
    """
    figure, axes = _draw(phases)
    axes.axvline(resumed_at, color="0.4", ls=":")
    axes.annotate(
        f"resumed from the checkpoint of step {resumed_at}",
        (resumed_at, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(6, -8),
        textcoords="offset points",
        va="top",
        color="0.3",
    )
    figure.savefig(path, dpi=120)


def draw_runs(runs: list[tuple[str, Curve]], path: Path) -> None:
    """Plot training and held-out loss of several runs, as PNG; see :func:`draw_phases`."""
    _draw(runs)[0].savefig(path, dpi=120)


def _draw(runs: list[tuple[str, Curve]]) -> tuple[Any, Any]:
    """Return a figure with all curves, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, curve) in enumerate(runs):
        color = f"C{index}"
        losses, heldout = curve.losses, curve.heldout
        axes.plot(list(losses), list(losses.values()), color=color, lw=1, label=f"{label}, train")
        if heldout:
            points = list(heldout), list(heldout.values())
            axes.plot(*points, "o--", color=color, ms=4, label=f"{label}, held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure, axes
