"""What a run has written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_megacpp.checkpoint.folder import complete_checkpoints
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runs.events import Event, read_events
from nemo_megacpp.runs.run_folder import METRICS_FILE, RECIPE_FILE, RECORD
from nemo_megacpp.runs.summary import Summary, summarize


@dataclass(frozen=True)
class RunRecord:
    """What a run has written.

    Attributes:
        run_dir: its folder.
        summary, curve, events: what it recorded.
        recipe: what it trained, None for a run that NeMo's own command line started.
        recipe_text: the same as YAML.
        checkpoints: steps and folders of the complete ones that exist now.
    """

    run_dir: Path
    summary: Summary
    curve: Curve
    events: list[Event]
    recipe: Recipe | None
    recipe_text: str
    checkpoints: list[tuple[int, Path]]


def read_run(run_dir: Path) -> RunRecord:
    """Read what a run has written.

    Raises:
        UserError: the folder is not a run with a step, or holds damaged files.
    """
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
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"The record in {run_dir / RECORD} is damaged: {error!r}.") from None
    if summary is None:
        raise UserError(f"{str(run_dir)!r} has not made a step yet: {METRICS_FILE} holds none.")
    recipe_file = run_dir / RECIPE_FILE
    known = recipe_file.exists()
    return RunRecord(
        run_dir,
        summary,
        curve,
        events,
        recipe=resolve(str(recipe_file)) if known else None,
        recipe_text=recipe_file.read_text(encoding="utf-8") if known else "",
        checkpoints=complete_checkpoints(run_dir / "checkpoints"),
    )
