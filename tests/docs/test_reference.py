"""The reference pages are made of docstrings, which have to read well there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.commands import ROOT

_PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
_SHARED = re.compile(r"^ +\w+(?:, \w+)+ ?: ", re.MULTILINE)


def _source(name: str) -> Path:
    """Return the file of a module, or of the object in one, that a page names."""
    while name:
        path = ROOT / Path(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
        name = name.rpartition(".")[0]
    raise AssertionError("a page names nothing of this package")


def _docstrings(file: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]


def test_every_parameter_has_a_line_of_its_own() -> None:
    """The page takes ``lr, min_lr: …`` for a parameter ``lr,`` of type ``min_lr``."""
    names = [n for page in _PAGES for n in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    files = {_source(name) for name in names}
    assert len(files) > 20
    shared = {
        f"{file.name}: {line}"
        for file in files
        for text in _docstrings(file)
        for line in _SHARED.findall(text)
    }
    assert not shared


def test_roles_of_docstrings_become_links() -> None:
    scope: dict = {}
    exec((ROOT / "docs" / "hooks.py").read_text(encoding="utf-8"), scope)
    html = "<p>see :func:<code>a.b</code>::</p>"
    assert scope["on_page_content"](html) == (
        '<p>see <autoref identifier="a.b" optional><code>a.b</code></autoref>:</p>'
    )
