"""Commands that are shown without output, for a cluster, a container or a long run: at least legal.

They are read by the parsers and signatures that they are meant for; nothing is run.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from nemo_megacpp.cli import build_parser
from nemo_megacpp.recipes.recipe import resolve
from tests.docs.commands import PAGES, ROOT

_TEXTS = [*PAGES, ROOT / "docker" / "README.md"]
_BLOCK = re.compile(r"^```sh\n(.*?)^```$|^((?:    .*\n)+)", re.MULTILINE | re.DOTALL)


def _lines() -> list[str]:
    """Return the commands of all blocks, with continued lines joined."""
    found = []
    for page in _TEXTS:
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            block = re.sub(r"\\\n\s*", "", match[1] or match[2])
            found += [line.strip() for line in block.splitlines()]
    return found


def _arguments(program: str) -> list[str]:
    """Return what follows ``program`` in every command, up to a pipe or a redirection."""
    pattern = re.compile(rf"(?:^|[ /]){program} (?!.*{program} )((?:'[^']*'|[^|>'])+)")
    return [found[1] for line in _lines() if (found := pattern.search(line))]


_NOT_OURS = {"checkpoint verify", "."}  # several names in one, and an image of our name
OURS = [words for words in _arguments("nemo-megacpp") if words not in _NOT_OURS]
FACTORIES = re.findall(
    r'--factory "?(\w+(?:\([^)]*\))?)', "\n".join(_arguments("nemo llm pretrain"))
)


@pytest.mark.parametrize("words", OURS)
def test_a_command_of_ours_is_legal(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = build_parser().parse_args(shlex.split(words))
    if getattr(args, "overrides", None):
        # Not the values: a folder that the reader is to make is not here.
        resolve(args.recipe, args.overrides)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_factory_takes_what_it_is_given(factory: str) -> None:
    import inspect

    from nemo_megacpp.nemo import factories

    name, _, rest = factory.partition("(")
    given = [word.partition("=")[0].strip() for word in rest.rstrip(")").split(",") if word]
    function: Any = getattr(factories, name)
    assert set(given) <= set(inspect.signature(function).parameters)


def test_the_pages_show_such_commands() -> None:
    assert len(OURS) > 15 and len(FACTORIES) > 3
