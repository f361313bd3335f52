"""The HTML page of a run: nothing outside it is needed to show it."""

from __future__ import annotations

import io
import math
from pathlib import Path

from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.contract.plan_page import plan_summary
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import job_of
from nemo_megacpp.render import (
    Table,
    Tone,
    html_details,
    html_page,
    html_pairs,
    html_table,
    html_text,
    show_bytes,
)
from nemo_megacpp.runs.record import RunRecord
from nemo_megacpp.runs.run_folder import RECIPE_FILE, RECORD
from nemo_megacpp.runs.summary import Summary
from nemo_megacpp.runtime.host import current_host

PAGE_FILE = f"{RECORD}/report.html"
_TONES: dict[str, Tone] = {"finished": "good", "stopped": "warning", "failed": "bad"}
_POINTS = 1200
"""Points of a curve that a page can tell apart."""

_MARKED = ("resumed", "stopped", "failed")


def write_page(record: RunRecord, out: Path | None = None) -> Path:
    """Write the page about a run.

    Args:
        record: what the run has left.
        out: the page; ``record/report.html`` in the run's folder if not given.

    Returns:
        The page.

    Raises:
        UserError: the page cannot be written.
    """
    out = out or record.run_dir / PAGE_FILE
    try:
        out.write_text(page(record), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {str(out)!r}: {error.strerror}.") from error
    return out


def page(record: RunRecord) -> str:
    """Return the page, with the plan of the recipe where there is one."""
    status, name = record.summary.status, record.run_dir.resolve().name
    tone = _TONES.get(status, "")
    pattern = str(record.recipe.pattern) if record.recipe else _at_start(record, "pattern")
    parts = [
        f'<h1>{html_text(name)} <span class="pill {tone}">{html_text(status)}</span></h1>',
        f'<p class="mono">{html_text(pattern)}</p>',
        html_pairs(record.summary.rows()),
        "<h2>Curves</h2>",
        _curves(record),
        "<h2>Layout</h2>",
        _layout(record),
    ]
    if record.recipe is not None:
        parts += ["<h2>Plan</h2>", _plan(record.recipe, record.summary)]
    parts += ["<h2>Events</h2>", _events(record)]
    if record.checkpoints:
        rows = [(f"step {step:,}", str(path)) for step, path in record.checkpoints]
        parts += ["<h2>Checkpoints on disk</h2>", html_pairs(rows)]
    if record.recipe_text:
        parts += [
            "<h2>Recipe</h2>",
            html_details(
                str(record.run_dir / RECIPE_FILE),
                f"<pre>{html_text(record.recipe_text)}</pre>",
                is_open=True,
            ),
        ]
    return html_page(name, parts)


def _plan(recipe: Recipe, summary: Summary) -> str:
    """Return what the layout splits, stores and costs, with the kernels of this machine."""
    kernels = "torch" if current_host().device == "cpu" else "gpu"
    try:
        plan = make_plan(job_of(recipe, kernels=kernels))
    except UserError as reason:
        return f"<p>{html_text(str(reason))}</p>"
    return plan_summary(plan) + _memory(plan.fullest.memory.total, summary)


def _memory(planned: int, summary: Summary) -> str:
    """Return the plan's memory beside the measured peak, and what their difference is."""
    if summary.memory is None:
        return ""
    rows = [("planned", planned), ("measured peak", summary.memory)]
    if summary.memory_added is not None:
        rows.append(("before the model was built", summary.memory - summary.memory_added))
        rows.append(("added by model, optimizer and training", summary.memory_added))
    return (
        "<h3>Memory of the fullest rank</h3>"
        + html_pairs((name, show_bytes(size)) for name, size in rows)
        + '<p class="note">The plan counts parameters, gradients, optimizer state and saved '
        "activations. The measured peak also holds temporaries and, without a GPU, the whole "
        "process: Python, PyTorch, NeMo and the data.</p>"
    )


def _at_start(record: RunRecord, name: str) -> str:
    """Return a detail of the event that the last session recorded when it started."""
    for event in reversed(record.events):
        if name in event.details and event.kind in ("started", "resumed"):
            return str(event.details[name])
    return ""


def _layout(record: RunRecord) -> str:
    recipe = record.recipe
    if recipe is None:
        return html_pairs([("layout", _at_start(record, "layout") or "not recorded")])
    training = recipe.training
    values = {
        "layout": recipe.layout.describe(),
        **recipe.layout.megatron_fields(),
        "micro_batch_size": f"{training.micro_batch_size:,}",
        "global_batch_size": f"{training.global_batch_size:,}",
        "seq_length": f"{recipe.model['seq_length']:,}",
        "packed_documents": training.packed_documents,
    }
    if ranks := _at_start(record, "ranks"):
        values["ranks started"] = ranks
    return html_pairs(
        (name, value if isinstance(value, str) else str(value).lower())
        for name, value in values.items()
    )


def _events(record: RunRecord) -> str:
    if not record.events:
        return "<p>None recorded.</p>"
    table = Table(("<time", "<event", "step", "<details"))
    for event in record.events:
        table.add(
            f"{event.time:%Y-%m-%d %H:%M:%S} UTC",
            event.kind,
            f"{event.step:,}",
            ", ".join(f"{name}: {value}" for name, value in event.details.items()),
        )
    return html_table(table)


def _curves(record: RunRecord) -> str:
    """Draw the recorded curves into one SVG, with a line where the run was resumed or ended
    early."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(record)
    marked = [event for event in record.events if event.kind in _MARKED and event.step > 0]
    rows = math.ceil(len(panels) / 2)
    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "nemo_megacpp"}):
        figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes, (title, lines) in zip(grid, panels.items(), strict=False):
            for label, points in lines.items():
                shown = thinned(points)
                style = {"marker": "o", "ms": 3} if len(shown) < 40 else {}
                axes.plot(*zip(*shown, strict=True), lw=1.2, label=label, **style)
            for event in marked:
                axes.axvline(event.step, color="0.5", ls=":", lw=1)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.25)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                axes.legend(frameon=False)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    lines_at = ", ".join(f"{event.kind} at step {event.step:,}" for event in marked)
    note = f"<p>Dotted: {html_text(lines_at)}.</p>" if marked else ""
    return text[text.index("<svg") :] + note


Points = list[tuple[int, float]]


def _panels(record: RunRecord) -> dict[str, dict[str, Points]]:
    """Return points by title and label; no panel for a quantity that was not recorded."""
    steps = sorted(record.curve.steps.items())

    def of(name: str, unit: float = 1.0) -> Points:
        return [(step, row[name] / unit) for step, row in steps if row.get(name) is not None]

    aux: dict[str, Points] = {}
    for step, row in steps:
        for name, value in sorted(row.get("aux", {}).items()):
            aux.setdefault(name, []).append((step, value))
    panels: dict[str, dict[str, Points]] = {
        "loss (nats per token)": {
            "train": of("loss"),
            "held-out": sorted(record.curve.heldout.items()),
        },
        "auxiliary loss": aux,
        "gradient norm": {"": of("grad_norm")},
        "learning rate": {"": of("lr")},
        "tokens per second": {"": of("tokens_per_second")},
        "TFLOP/s per rank": {"": of("tflops_per_rank")},
        "MFU": {"": of("mfu")},
        "peak memory of the fullest rank (GiB)": {"": of("memory", 2**30)},
    }
    found = {
        title: {label: points for label, points in lines.items() if points}
        for title, lines in panels.items()
    }
    return {title: lines for title, lines in found.items() if lines}


def thinned(points: Points, most: int = _POINTS) -> Points:
    """Return at most about ``most`` points: of each stretch the lowest and the highest.

    A spike stays a spike; NaN and Inf leave gaps.
    """
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    chosen: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        chosen += sorted(ends)
    return chosen
