"""Every command that the documentation shows with output is run, and prints what is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .commands import PAGES, ROOT, Command, blocks, missing, run, workplace

COMMANDS = [
    pytest.param(command, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, command in enumerate(
        command for block in blocks(page.read_text(encoding="utf-8")) for command in block
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all pages: a later command may use what an earlier one made."""
    return workplace(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_prints_what_is_shown(command: Command, folder: Path) -> None:
    printed = run(command.text, folder)
    assert any(line.strip() for line in command.shown), f"{command.text}: no output is shown"
    lost = missing(command.shown, printed)
    assert not lost, f"$ {command.text}\nnot printed: {lost}\nprinted:\n" + "\n".join(printed)


def test_the_comparison_sees_other_words() -> None:
    assert not missing(["loss 7.61  step 4"], ["x", "loss 7.5 step 12"])
    assert not missing(["a", "…", "c"], ["a", "b", "c"])
    assert not missing(["saved …/run"], ["saved /somewhere/run"])
    assert missing(["loss 7.61"], ["gain 7.61"]) == ["loss 7.61"]
    assert missing(["b", "a"], ["a", "b"]) == ["a"]


def test_what_a_page_includes_is_included() -> None:
    """The strict build misses a marker that is spelled otherwise, and shows it as text."""
    included = [
        line
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if "8<" in line.replace(" ", "")
    ]
    assert len(included) == 4
    for line in included:
        path = re.fullmatch(r'--8<-- "(\S+)"', line)
        assert path is not None and (ROOT / path[1]).is_file(), line
