"""``nemo-megacpp report``: a run as one HTML page. Building the parser loads no heavy library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.run_folder import METRICS_FILE, RECIPE_FILE, RECORD

if TYPE_CHECKING:
    from nemo_megacpp.recipes.curves import Curve
    from nemo_megacpp.recipes.events import Event
    from nemo_megacpp.recipes.recipe import Recipe
    from nemo_megacpp.recipes.summary import Summary

REPORT_FILE = f"{RECORD}/report.html"


@dataclass(frozen=True)
class Section:
    """A part of the page that others add: a title, and HTML that is safe to include."""

    title: str
    html: str


@dataclass(frozen=True)
class RunReport:
    """What a run has left behind.

    Attributes:
        run_dir: its folder.
        summary, curve, events: what it recorded.
        recipe: what it trained, None for a run that NeMo's own command line started.
        recipe_text: the same as YAML.
        checkpoints: folders and steps of those that are still there and whole.
    """

    run_dir: Path
    summary: Summary
    curve: Curve
    events: list[Event]
    recipe: Recipe | None
    recipe_text: str
    checkpoints: list[tuple[int, Path]]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``report``; it sets ``run``, a function of the parsed arguments."""
    report = subparsers.add_parser(
        "report",
        help="show a run as one HTML page",
        description="Write one self-contained HTML page about a run, ended or under way: curves, "
        "layout, recipe, checkpoints, and events such as resumes.",
    )
    report.add_argument("run_dir", metavar="RUN", help="the run's folder")
    report.add_argument("--out", metavar="FILE", help=f"page to write (default RUN/{REPORT_FILE})")
    report.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nemo_megacpp.recipes.report_plan import plan_section

    run_dir = Path(args.run_dir)
    recipe = read_run(run_dir).recipe
    sections = [] if recipe is None else [plan_section(recipe)]
    print(write_report(run_dir, args.out and Path(args.out), sections))
    return 0


def write_report(run_dir: Path, out: Path | None = None, sections: Sequence[Section] = ()) -> Path:
    """Write the page about a run.

    Args:
        run_dir: the run's folder.
        out: the page; ``record/report.html`` in the run's folder if not given.
        sections: what is to stand on it beside what the run recorded.

    Returns:
        The page.

    Raises:
        UserError: the folder is no run with a step, or the page cannot be written.
    """
    report = read_run(run_dir)
    from nemo_megacpp.recipes.report_page import page

    out = out or run_dir / REPORT_FILE
    try:
        out.write_text(page(report, sections), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {str(out)!r}: {error.strerror}.") from error
    return out


def read_run(run_dir: Path) -> RunReport:
    """Read what a run has left.

    Raises:
        UserError: the folder is no run with a step, or holds damaged files.
    """
    from nemo_megacpp.recipes.curves import read_curve
    from nemo_megacpp.recipes.events import read_events
    from nemo_megacpp.recipes.recipe import resolve
    from nemo_megacpp.recipes.summary import summarize

    if not run_dir.is_dir():
        what = "is not a folder" if run_dir.exists() else "does not exist"
        raise UserError(f"The run {str(run_dir)!r} {what}.")
    if not (run_dir / METRICS_FILE).exists():
        raise UserError(
            f"{str(run_dir)!r} is not a run with a step: it has no {METRICS_FILE}. Name the folder "
            f"that 'run folder:' named when the training began."
        )
    try:
        summary, curve, events = summarize(run_dir), read_curve(run_dir), read_events(run_dir)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"The record in {run_dir / RECORD} is damaged: {error!r}.") from None
    if summary is None:
        raise UserError(f"{str(run_dir)!r} has not made a step yet: {METRICS_FILE} holds none.")
    recipe_file = run_dir / RECIPE_FILE
    known = recipe_file.exists()
    return RunReport(
        run_dir,
        summary,
        curve,
        events,
        recipe=resolve(str(recipe_file)) if known else None,
        recipe_text=recipe_file.read_text(encoding="utf-8") if known else "",
        checkpoints=_checkpoints(run_dir / "checkpoints"),
    )


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    from nemo_megacpp.checkpoint.identity import read_identity

    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        identity = read_identity(path) if path.is_dir() else None
        if identity is not None:
            found.append((int(identity["step"]), path))
    return sorted(found)
