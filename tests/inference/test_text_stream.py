"""Text as it comes: no half characters, nothing after a stop string, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemo_megacpp.inference.text_stream import TextStream


def _bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def _stream(text: bytes, stop: Sequence[str] = (), prompt: bytes = b"") -> tuple[list[str], bool]:
    stream = TextStream(_bytes, list(prompt), stop)
    parts = []
    for token in text:
        parts.append(stream.push(token))
        if stream.stopped:
            return parts, True
    return [*parts, stream.close()], stream.stopped


def test_a_character_appears_when_it_is_whole() -> None:
    parts, _ = _stream("aé世!".encode(), prompt="π".encode())
    assert parts == ["a", "", "é", "", "", "世", "!", ""]


def test_bytes_that_are_no_character_are_not_waited_for() -> None:
    parts, _ = _stream(b"\xff\xff\xff\xffab\xff")
    assert "".join(parts) == "\ufffd" * 4 + "ab\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "shown", "stopped"),
    [
        (b"one;two", [";"], "one", True),
        (b"a**b*/c", ["*/"], "a**b", True),
        (b"ababac", ["abac"], "ab", True),
        (b"x = y; }", ["}", "; }"], "x = y", True),
        (b"no end here */", ["*/*"], "no end here */", False),
    ],
)
def test_a_stop_string_ends_the_text(
    text: bytes, stop: list[str], shown: str, stopped: bool
) -> None:
    parts, ended = _stream(text, stop)
    assert ("".join(parts), ended) == (shown, stopped)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    parts, _ = _stream(b"a--b", ["-->"])
    assert parts == ["a", "", "", "--b", ""]
