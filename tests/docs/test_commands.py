"""Every command that the documentation shows with output is run, and prints what is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.docs.commands import (
    PAGES,
    ROOT,
    blocks,
    missing,
    run,
    run_preloaded,
    starts_no_ranks,
    workplace,
)
from tests.selection import slow_if

COMMANDS = {
    f"{page.stem}-{index}": command
    for page in PAGES
    for index, command in enumerate(
        command for block in blocks(page.read_text(encoding="utf-8")) for command in block
    )
}
ALONE = (
    *("verify", "gathers", "ladder", "nemo", "megatron", "containers", "extending", "samples"),
)
"""Pages whose commands use nothing that those of another page have made."""
SLOW = (
    *("first-run-2", "checkpoints-2", "checkpoints-3", "checkpoints-4", "checkpoints-5"),
    *("huggingface-0", "huggingface-1"),
    *("layouts-3", "layouts-6", "layouts-7", "layouts-8"),
    *("verify-0", "gathers-0", "extending-0", "nemo-0", "nemo-1", "nemo-2", "nemo-3"),
    *("ladder-0", "ladder-1", "samples-0", "samples-1", "evaluate-0", "evaluate-1"),
)
"""Commands that import NeMo or start ranks and do what tests with the pool do in less time,
and those that use what such a command has made."""

PREPARE = (
    'python -c "from nemo_megacpp.data.builtin import ensure_builtin as e; '
    'e(512, False); e(2048, False)"'
)
"""Prepares the built-in corpora, before ``megatron-args`` and ``doctor`` say what is there."""


@pytest.fixture(scope="module")
def printed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[str]]]]:
    """What the commands that are asked for print, by name; two at a time, in one folder.

    A later command may use what an earlier one made: each of the two goes in the pages' order.
    """
    folder = workplace(tmp_path_factory.mktemp("reader"))
    asked = {getattr(item, "callspec", None) and item.callspec.id for item in request.session.items}
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(run, PREPARE, folder)
        yield {
            name: (one if name.startswith(ALONE) else other).submit(
                run_preloaded if starts_no_ranks(command) else run, command.text, folder
            )
            for name, command in COMMANDS.items()
            if name in asked
        }
        for pool in (one, other):
            pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.processes
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_if(name in SLOW)) for name in COMMANDS]
)
def test_a_shown_command_prints_what_is_shown(
    name: str, printed: dict[str, Future[list[str]]]
) -> None:
    command, lines = COMMANDS[name], printed[name].result()
    assert any(line.strip() for line in command.shown), f"{command.text}: no output is shown"
    lost = missing(command.shown, lines)
    assert not lost, f"$ {command.text}\nnot printed: {lost}\nprinted:\n" + "\n".join(lines)


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
    assert len(included) == 5
    for line in included:
        path = re.fullmatch(r'--8<-- "(\S+)"', line)
        assert path is not None and (ROOT / path[1]).is_file(), line
