"""Which releases of Megatron-Core are proved, tried and refused, and where it is written."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from megatron import core
from packaging.requirements import Requirement

from nemo_megacpp.core import releases
from nemo_megacpp.core.releases import PROVED, imported, require_supported, standing_of
from nemo_megacpp.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("release", "standing"),
    [
        ("0.16.1", "proved"),
        ("0.19.2", "proved"),
        ("0.16.0", "tried"),
        ("0.19.0", "tried"),
        ("0.15.3", "refused"),
        ("0.17.1", "refused"),
        ("0.18.2", "refused"),
        ("0.20.0rc0", "refused"),
        ("1.16.1", "refused"),
        ("main", "refused"),
    ],
)
def test_standing(release: str, standing: str) -> None:
    assert standing_of(release) == standing


def test_the_tests_run_on_a_proved_release() -> None:
    assert imported() in PROVED
    require_supported()


def test_the_commit_around_it_is_not_part_of_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.19.2 in an environment inside this project's clone says that it is 0.19.2+a905b4f."""
    monkeypatch.setattr(core, "__version__", "0.19.2+a905b4f")
    assert imported() == "0.19.2"


def test_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "imported", lambda: "0.17.1")
    with pytest.raises(UserError, match=r"0\.17\.1 is not supported \(proved: 0\.16\.1 and 0\.19"):
        require_supported()


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


OLD, NEW = _pins("requirements-cpu.txt"), _pins("requirements-core-new.txt")


def test_the_two_environments_are_the_proved_releases() -> None:
    assert (OLD["megatron-core"], NEW["megatron-core"]) == PROVED


def test_the_two_environments_differ_in_megatron_core_alone() -> None:
    """So a difference between them is Megatron's, and not that of another library."""
    assert {n for n in NEW if n in OLD and NEW[n] != OLD[n]} == {"megatron-core"}
    assert not NEW.keys() - OLD.keys()
    assert "nvidia-resiliency-ext" not in NEW, "with 0.4.1 megatron.core 0.19.2 does not import"


def test_the_extra_accepts_what_is_not_refused() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for extra, series in (("core", ("0.16", "0.19")), ("nemo", ("0.16",))):
        (core,) = (
            Requirement(text) for text in extras[extra] if Requirement(text).name == "megatron-core"
        )
        for number in range(14, 22):
            release = f"0.{number}.1"
            assert core.specifier.contains(release) == (f"0.{number}" in series), (extra, release)


def test_the_page_says_what_the_tests_run() -> None:
    """The table of ``docs/versions.md`` against the pinned sets and the Makefile."""
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    head, _, *body = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in itertools.takewhile(str.strip, page[page.index("| |") :].splitlines())
    ]
    table = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert head[1:] == ["make test", "make test-core-new"]
    for column, pins in zip(head[1:], (OLD, NEW), strict=True):
        assert re.search(rf"^{column.removeprefix('make ')}:", makefile, re.MULTILINE)
        for package in ("megatron-core", "nemo-toolkit", "nemo_run", "torch", "triton"):
            assert table[package][column] == pins.get(package, "none"), (package, column)
