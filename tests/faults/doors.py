"""The commands that read what comes from elsewhere, and what their success must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import results
from tests.faults.forks import Ended
from tests.faults.workplace import RECIPE, SETTINGS, Workplace

Arguments = Callable[[Workplace, Path, Path], Sequence[object]]


@dataclass(frozen=True)
class Door:
    """A command.

    Attributes:
        name: in the outcome.
        arguments: from the workplace, the input and the folder to make.
        result: what is compared after exit code 0; None: nothing.
        of_out: the result is that of the folder that was made, not of the input.
    """

    name: str
    arguments: Arguments
    result: Callable[[str], Any] | None = None
    of_out: bool = False

    def open(self, place: Workplace, target: Path, folder: Path, compare: bool = False) -> Ended:
        """Run the command on ``target``; what it makes goes into ``folder``.

        Args:
            place: of the intact inputs.
            target: the input.
            folder: of the try.
            compare: find the result.
        """
        out = folder / "out"
        return place.forks.run(
            self.arguments(place, target, out),
            cwd=folder,
            then=self.result if compare else None,
            given=(str(out if self.of_out else target),),
        )


def _train(place: Workplace, *more: object) -> list[object]:
    return ["train", RECIPE, *SETTINGS, *more, "--dry-run"]


CHECKPOINT: tuple[Door, ...] = (
    Door(
        "checkpoint verify",
        lambda place, target, out: ["checkpoint", "verify", target],
        results.of_checkpoint,
    ),
    Door("checkpoint inspect", lambda place, target, out: ["checkpoint", "inspect", target]),
    Door(
        "checkpoint inspect --json",
        lambda place, target, out: ["checkpoint", "inspect", target, "--json"],
    ),
    Door(
        "checkpoint export",
        lambda place, target, out: ["checkpoint", "export", target, out],
        results.of_export,
        of_out=True,
    ),
    Door(
        "checkpoint reshard",
        lambda place, target, out: ["checkpoint", "reshard", target, out, "--layout", "tp=1"],
        results.of_checkpoint,
        of_out=True,
    ),
    Door(
        "train resume= --dry-run",
        lambda place, target, out: _train(
            place, f"data={place.data.root}", f"resume={target}", f"run_dir={out}"
        ),
        results.of_checkpoint,
    ),
    Door(
        "train init_from= --dry-run",
        lambda place, target, out: _train(
            place, f"data={place.data.root}", f"init_from={target}", f"run_dir={out}"
        ),
        results.of_checkpoint,
    ),
)
EXPORT: tuple[Door, ...] = (
    Door(
        "checkpoint import",
        lambda place, target, out: ["checkpoint", "import", target, out],
        results.of_checkpoint,
        of_out=True,
    ),
)
DATA: tuple[Door, ...] = (
    Door(
        "data inspect --rows",
        lambda place, target, out: ["data", "inspect", target, "--rows", 2, "--seq-length", 64],
    ),
    Door("data verify", lambda place, target, out: ["data", "verify", target], results.of_rows),
    Door(
        "train data= --dry-run",
        lambda place, target, out: _train(place, f"data={target}", f"run_dir={out}"),
        results.of_rows,
    ),
)


class Expected:
    """Results of the intact inputs, found once for each door."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Path], Any] = {}

    def of(self, door: Door, place: Workplace, intact: Path) -> Any:
        """Return what the door's result is for ``intact``."""
        if door.result is None:
            return None
        key = door.name, intact
        if key not in self._known:
            with place.own_folder() as folder:
                ended = door.open(place, intact, folder, compare=True)
            assert ended.code == 0, (door.name, ended)
            self._known[key] = ended.result
        return self._known[key]
