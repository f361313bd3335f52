"""``nemo-megacpp report``: a run as one HTML page."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add ``report`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "report",
        help="show a run as one HTML page",
        description="Write one self-contained HTML page about a run, ended or running: curves, "
        "layout, recipe, checkpoints, and events such as resumes.",
    )
    parser.add_argument("run_dir", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--out", metavar="FILE", help="page to write (default RUN/record/report.html)"
    )
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    from nemo_megacpp.runs.record import read_run
    from nemo_megacpp.runs.run_page import write_page

    print(write_page(read_run(Path(args.run_dir)), args.out and Path(args.out)))
    return 0
