"""The list of test files that are skipped without NeMo, held to what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs_nemo import NEEDS_NEMO

TESTS = Path(__file__).parent
NEMO = ("nemo", "nemo_run", "lightning", "fiddle", "nemo_megacpp.nemo")
"""What cannot be imported without NeMo."""
FREE = ("nemo_megacpp.nemo.versions",)


def _names(path: Path) -> Iterator[str]:
    """Yield what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _of_nemo(path: Path) -> set[str]:
    return {
        name
        for name in _names(path)
        if any(f"{name}.".startswith(f"{root}.") for root in NEMO) and not name.startswith(FREE)
    }


@pytest.mark.parametrize("name", NEEDS_NEMO)
def test_a_listed_file_needs_it(name: str) -> None:
    assert _of_nemo(TESTS / name)


def _selected() -> set[str]:
    """Return the files that ``make test-core-new`` collects."""
    text = (TESTS.parent / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith("CORE_NEW_TESTS"))
    words = line.partition("tests/,")[2].rstrip(") ").split()
    paths = [TESTS / word for word in words]
    files = {
        file
        for path in paths
        for file in (path.rglob("test_*.py") if path.is_dir() else [path])
        if "kernels" not in file.parts
    }
    return {str(file.relative_to(TESTS)) for file in files}


def test_the_others_do_not() -> None:
    """Of those that run on the newest Megatron-Core, which has no NeMo."""
    selected = _selected()
    assert len(selected) > 60 and NEEDS_NEMO.keys() <= selected
    assert {
        name: _of_nemo(TESTS / name)
        for name in selected - NEEDS_NEMO.keys()
        if _of_nemo(TESTS / name)
    } == {}
