"""Commands that are killed or run out of disk: nothing is lost, and the same command succeeds."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import results
from tests.faults.forks import Ended
from tests.faults.judge import Outcome, judge
from tests.faults.kinds import Kind, Site
from tests.faults.small_disk import small_disk
from tests.faults.workplace import Workplace, fingerprint

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_SMALLEST = 8192
"""Bytes of a file that are never too many: what a command prints is in files as well."""


@dataclass(frozen=True)
class _Maker:
    """A command that makes a folder."""

    name: str
    source: Callable[[Workplace], Path]
    arguments: Callable[[Path, Path], list[object]]
    result: Callable[[str], Any]

    def run(self, site: Site, source: Path, out: Path, **options: Any) -> Ended:
        arguments = self.arguments(source, out)
        cwd, given = site.folder, (str(out),)
        options["temporary"] = site.folder / "tmp"  # of both runs of a try
        return site.place.forks.run(arguments, cwd=cwd, then=self.result, given=given, **options)


_MAKERS = (
    _Maker(
        "data prepare",
        lambda place: place.texts,
        lambda source, out: [
            *("data", "prepare", source, "--out", out, "--vocab-size", 300, "--held-out", 0.3)
        ],
        results.of_rows,
    ),
    _Maker(
        "checkpoint reshard",
        Workplace.checkpoint,
        lambda source, out: ["checkpoint", "reshard", source, out, "--layout", "tp=1,pp=2"],
        results.of_checkpoint,
    ),
    _Maker(
        "checkpoint export",
        Workplace.checkpoint,
        lambda source, out: ["checkpoint", "export", source, out],
        results.of_export,
    ),
    _Maker(
        "checkpoint import",
        lambda place: place.exported,
        lambda source, out: ["checkpoint", "import", source, out],
        results.of_checkpoint,
    ),
)
_known: dict[tuple[str, Path], Ended] = {}


def _undisturbed(maker: _Maker, site: Site) -> Ended:
    """Return how the command ends if nothing happens to it; found once."""
    key = maker.name, site.place.root
    if key not in _known:
        with site.place.own_folder() as folder:
            own = Site(site.place, site.expected, folder)
            _known[key] = maker.run(own, maker.source(site.place), folder / "out")
        assert _known[key].code == 0, _known[key]
    return _known[key]


def _kill(draw: random.Random, site: Site) -> Outcome:
    maker = draw.choice(_MAKERS)
    usual, source = _undisturbed(maker, site), maker.source(site.place)
    before, out = fingerprint(source), site.folder / "out"
    number, everyone = draw.choice(_SIGNALS), draw.random() < 0.5
    moment = draw.uniform(0, 1.1 * usual.seconds)
    ended = maker.run(site, source, out, strike=(moment, number, everyone))
    who = "the group" if everyone else "the command"
    struck = ended.code != 0
    what = f"{number.name} to {who} of {maker.name} after {moment:.2f} of {usual.seconds:.2f} s"
    outcome = judge(
        ended,
        site.place,
        what,
        expected=usual.result,
        codes=(0, 1, 2, 130, -number),
        silent=True,
        temporary=False,
    )
    outcome.verdict = "survived"
    outcome.moment = f"{number.name}: {maker.name} {'struck' if struck else 'had ended'}"
    _check_afterwards(maker, site, outcome, source, before, usual)
    return outcome


def _full(draw: random.Random, site: Site) -> Outcome:
    maker = draw.choice(_MAKERS)
    usual, source = _undisturbed(maker, site), maker.source(site.place)
    before = fingerprint(source)
    with small_disk(site.folder / "disk", draw) as disk:
        out = (disk.folder if disk else site.folder) / "out"
        size = draw.randint(_SMALLEST, 1 << 20)
        ended = maker.run(site, source, out, file_size=None if disk else size)
        limit = f"a disk of {disk.size:,} bytes" if disk else f"files of at most {size:,} bytes"
        outcome = judge(ended, site.place, f"{maker.name} with {limit}", expected=usual.result)
        outcome.verdict = "survived"
        outcome.moment = f"{maker.name} {'refused' if ended.code else 'had enough'}"
        if ended.code and out.exists():
            outcome.wrong.append("out exists after the failure")
        if disk:
            disk.enlarge()
        _check_afterwards(maker, site, outcome, source, before, usual, out)
    return outcome


def _check_afterwards(
    maker: _Maker,
    site: Site,
    outcome: Outcome,
    source: Path,
    before: dict[str, str],
    usual: Ended,
    out: Path | None = None,
) -> None:
    """The source is as it was; ``out`` is complete or absent; the same command succeeds now, and
    removes what is left of the first, beside ``out`` and in the temporary folder."""
    out = out or site.folder / "out"
    if fingerprint(source) != before:
        outcome.wrong.append("the source has changed")
    again = maker.name == "data prepare" or not out.exists()
    if again:
        ended = maker.run(site, source, out)
        if ended.code != 0:
            outcome.wrong.append(f"the same command ends with {ended.code}: {ended.err[-300:]}")
        elif ended.result != usual.result:
            outcome.wrong.append("the same command has another result")
        if ended.temporary:
            outcome.wrong.append(f"left in the temporary folder: {ended.temporary}")
    left = sorted(path.name for path in out.parent.iterdir() if path.name not in (out.name, "tmp"))
    if left:
        outcome.wrong.append(f"left beside {out.name}: {left}")


KINDS = (
    Kind("kill-command", "prepare, reshard, export and import killed at random moments", _kill),
    Kind("disk-full", "the same on a disk that is full at a random moment", _full),
)
