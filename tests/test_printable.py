"""Nothing foreign steers a terminal, and no message is longer than a screen."""

from __future__ import annotations

import io
import sys
import time

import pytest
from rich.console import Console

from nemo_megacpp import cli, render
from nemo_megacpp.errors import RankFailed, UserError
from nemo_megacpp.printable import cut, printable, screenful, shown
from tests.malformed import ESCAPES


def test_control_characters_are_written_as_escapes() -> None:
    assert printable("a\x1b[2J\x9b\x7f\u202e\u2028\r\ud800") == (
        r"a\x1b[2J\x9b\x7f\u202e\u2028\x0d\ud800"
    )
    assert printable("TP=2 × 3\n\tünïcode 漢字") == "TP=2 × 3\n\tünïcode 漢字"
    printable("".join(map(chr, range(0x110000)))).encode()


def test_a_value_is_shortened_in_no_time() -> None:
    began = time.monotonic()
    loop: list[object] = []
    loop.append(loop)
    twice: object = []
    for _ in range(60):
        twice = [twice, twice]
    huge = ["x" * 50_000_000, list(range(10**6)), loop, twice, 10**5000, {"a": 1 << 10**6}]
    for value in (*huge, huge):
        assert len(shown(value)) < 200
    assert time.monotonic() - began < 2
    assert shown("it") == "'it'" and shown([1, 2]) == "[1, 2]"
    assert cut("x" * 90, 80) == "x" * 80 + "… 10 more characters"


@pytest.mark.parametrize("message", ["x" * 12_000_000, "x\n" * 10_000, "\x1b" * 9000])
def test_a_message_is_no_longer_than_a_screen(message: str) -> None:
    text = screenful(message)
    assert len(text) < 4100 and text.count("\n") < 40 and "\x1b" not in text
    assert text.endswith(" more characters")


def test_a_usual_message_stays_as_it_is() -> None:
    message = "3 settings are invalid:\n  1. a\n  2. b\n  3. c"
    assert screenful(message) == message


@pytest.mark.parametrize("error", [UserError, RankFailed])
def test_the_command_line_prints_no_escapes(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error(ESCAPES + "y" * 10**6)

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(sys, "argv", ["nemo-megacpp", "recipes"])
    with pytest.raises(SystemExit):
        cli.main()
    shown_text = capsys.readouterr().err
    assert "\\x1b]0;owned" in shown_text and len(shown_text) < 4200
    assert shown_text == printable(shown_text)


def test_arguments_are_quoted_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.read_arguments(["train", "nam56r_tiny", "--x" + ESCAPES])
    text = capsys.readouterr().err
    assert text == printable(text)


def test_tables_and_pages_show_no_escapes() -> None:
    table = render.Table(("<" + ESCAPES, "b"), title=ESCAPES)
    table.add(ESCAPES, render.Toned(ESCAPES, "bad"))
    table.add("x" * 100_000, "")
    console = render.make_console(100)
    console.file = stream = io.StringIO()
    render.print_table(console, table)
    console.print(f"[bold]A[/bold] {ESCAPES}")
    printed = stream.getvalue()
    assert printed == printable(printed) and "\\x1b]0;owned" in printed.replace("\n", "")
    assert len(printed) < 20_000
    page = render.html_page(
        ESCAPES, [render.html_table(table), render.html_pairs([("a", ESCAPES)])]
    )
    assert page == printable(page) and "\\x1b]0;owned" in page
    assert isinstance(console, Console)
