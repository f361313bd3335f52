"""The HTML page of a run: nothing outside it is needed to show it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from html import escape

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.report import RunReport, Section

_POINTS = 1200
"""Points of a curve that a page can tell apart."""

_MARKED = {"resumed": "resumed", "stopped": "stopped", "failed": "failed"}

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1b2330; background: #fff;
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5dae1; }
p.pattern { font: 14px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; color: #55606f; }
.status { display: inline-block; padding: 0 .6em; border-radius: 1em; background: #e4e8ee; }
.finished { background: #d6f0dc; }
.stopped { background: #fdeec6; }
.failed { background: #fad7d7; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid #eef0f3; }
td:last-child { overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
svg { width: 100%; height: auto; }
pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def page(report: RunReport, sections: Sequence[Section] = ()) -> str:
    """Return the page, with what others add before its events."""
    summary = report.summary
    status = summary.status
    parts = [
        f"<h1>{escape(report.run_dir.resolve().name)} "
        f'<span class="status {status.replace(" ", "-")}">{escape(status)}</span></h1>',
        f'<p class="pattern">{escape(_pattern(report))}</p>',
        _table(summary.rows()),
        "<h2>Curves</h2>",
        _curves(report),
        "<h2>Layout</h2>",
        _layout(report),
    ]
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", section.html]
    parts += ["<h2>Events</h2>", _events(report)]
    if report.checkpoints:
        rows = [(f"step {step:,}", str(path)) for step, path in report.checkpoints]
        parts += ["<h2>Checkpoints there now</h2>", _table(rows)]
    if report.recipe_text:
        parts += [
            "<h2>Recipe</h2>",
            f"<details open><summary>{escape(str(report.run_dir / 'record/recipe.yaml'))}"
            f"</summary><pre>{escape(report.recipe_text)}</pre></details>",
        ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(report.run_dir.resolve().name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _table(rows: Iterable[tuple[str, ...]], heading: tuple[str, ...] = ()) -> str:
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in heading)}</tr>" if heading else ""
    lines = [
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    ]
    return f"<table>{head}{''.join(lines)}</table>"


def _begun(report: RunReport, name: str) -> str:
    """Return what the last session said of itself when it began."""
    for event in reversed(report.events):
        if name in event.details and event.kind in ("started", "resumed"):
            return str(event.details[name])
    return ""


def _pattern(report: RunReport) -> str:
    recipe = report.recipe
    return str(recipe.pattern) if recipe is not None else _begun(report, "pattern")


def _layout(report: RunReport) -> str:
    recipe = report.recipe
    if recipe is None:
        return _table([("layout", _begun(report, "layout") or "not recorded")])
    layout = recipe.layout
    rows = [("layout", layout.describe()), *_degrees(layout), *_batch(recipe)]
    ranks = _begun(report, "ranks")
    return _table([*rows, ("ranks started", ranks)] if ranks else rows)


def _degrees(layout: ParallelLayout) -> list[tuple[str, str]]:
    return [(name, str(value).lower()) for name, value in layout.megatron_fields().items()]


def _batch(recipe: Recipe) -> list[tuple[str, str]]:
    training = recipe.training
    return [
        ("micro_batch_size", f"{training.micro_batch_size:,}"),
        ("global_batch_size", f"{training.global_batch_size:,}"),
        ("seq_length", f"{recipe.model['seq_length']:,}"),
        ("packed_documents", str(training.packed_documents).lower()),
    ]


def _events(report: RunReport) -> str:
    if not report.events:
        return "<p>None recorded.</p>"
    rows = [
        (
            f"{event.time:%Y-%m-%d %H:%M:%S} UTC",
            event.kind,
            f"{event.step:,}",
            ", ".join(f"{name}: {value}" for name, value in event.details.items()),
        )
        for event in report.events
    ]
    return _table(rows, ("time", "event", "step", "details"))


def _curves(report: RunReport) -> str:
    """Draw the curves that there are into one SVG, with a line where the run was resumed or ended
    early."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report)
    rows = math.ceil(len(panels) / 2)
    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "nemo_megacpp"}):
        figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes, (title, lines) in zip(grid, panels, strict=False):
            for label, points in lines.items():
                kept = thinned(points)
                style = {"marker": "o", "ms": 3} if len(kept) < 40 else {}
                axes.plot(
                    [step for step, _ in kept], [y for _, y in kept], lw=1.2, label=label, **style
                )
            for event in report.events:
                if event.kind in _MARKED and event.step > 0:
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
    said = ", ".join(
        f"{_MARKED[event.kind]} at step {event.step:,}"
        for event in report.events
        if event.kind in _MARKED and event.step > 0
    )
    note = f"<p>Dotted: {escape(said)}.</p>" if said else ""
    return text[text.index("<svg") :] + note


Points = list[tuple[int, float]]


def _panels(report: RunReport) -> list[tuple[str, dict[str, Points]]]:
    """Return titles, and points by label; of a quantity that was not recorded, no panel."""
    steps = sorted(report.curve.steps.items())

    def of(name: str) -> Points:
        return [
            (step, float(record[name])) for step, record in steps if record.get(name) is not None
        ]

    aux = sorted({name for _, record in steps for name in record.get("aux", {})})
    panels: list[tuple[str, dict[str, Points]]] = [
        (
            "loss (nats per token)",
            {"train": of("loss"), "held-out": sorted(report.curve.heldout.items())},
        ),
        (
            "auxiliary loss",
            {
                name: [
                    (step, record["aux"][name]) for step, record in steps if name in record["aux"]
                ]
                for name in aux
            },
        ),
        ("gradient norm", {"": of("grad_norm")}),
        ("learning rate", {"": of("lr")}),
        ("tokens per second", {"": of("tokens_per_second")}),
        (
            "peak memory of the fullest rank (GiB)",
            {"": [(step, size / 2**30) for step, size in of("memory")]},
        ),
    ]
    shown = [
        (title, {label: points for label, points in lines.items() if points})
        for title, lines in panels
    ]
    return [(title, lines) for title, lines in shown if lines]


def thinned(points: Points, most: int = _POINTS) -> Points:
    """Return at most about ``most`` points: of each stretch the lowest and the highest.

    A spike stays a spike; numbers that are none are left to the gaps they make.
    """
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept
