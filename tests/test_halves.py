"""The two halves of the suite: no test is left out, and no failure is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import halves

ROOT = Path(__file__).parent


def test_every_test_that_uses_the_pool_is_marked(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        uses = "ranks" in getattr(item, "fixturenames", ())
        assert uses == (item.get_closest_marker("ranks") is not None), item.nodeid


def test_a_module_that_starts_processes_says_which_tests_do() -> None:
    """So that `make check` starts none."""
    starts = ("import subprocess", "WorkerPool(", "Start = ")
    for file in ROOT.rglob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        if file != Path(__file__) and any(word in text for word in starts):
            assert "mark.processes" in text, file.relative_to(ROOT)


def test_the_last_line_is_pytests() -> None:
    last = [
        "3 failed, 10 passed, 2 skipped, 40 deselected in 100.10s (0:01:40)",
        "7 passed in 9.99s",
    ]
    assert halves.summary(last, 101.5) == "3 failed, 17 passed, 2 skipped in 101.50s"
    assert halves.summary(["1 error in 0.5s", "2 errors in 0.5s"], 1) == "3 error in 1.00s"


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([0, 1], 1), ([2, 0], 2), ([5, 0], 0), ([0, 5], 0), ([5, 5], 5), ([0, -9], -9)],
)
def test_both_exit_codes_count(codes: list[int], code: int) -> None:
    assert halves.exit_code(codes) == code


@pytest.mark.processes
@pytest.mark.parametrize(("word", "code"), [("last_line", 0), ("none_such", 5)])
def test_both_halves_run(word: str, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = f"{word} and not both_halves"  # which would start itself
    assert halves.run("", ["-k", chosen, str(Path(__file__)), "-p", "no:cacheprovider"]) == code
    printed = capfd.readouterr().out
    assert "== tests: ranks" in printed and "== tests: not ranks" in printed
    assert printed.splitlines()[-1].startswith("1 passed in" if code == 0 else "no tests ran in")
