"""Text of a growing sequence: whole characters, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are not a character yet."""
_MOST_BYTES = 4
"""Of a character in UTF-8; bytes that are none after so many tokens never become one."""


class TextStream:
    """Turns tokens into text as they come.

    Args:
        decode: from ids to text.
        prompt: ids before the first one; some decoders write a word by what stands before it.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
    ):
        self._decode, self._stop = decode, tuple(stop)
        self._before: list[int] = list(prompt[-_MOST_BYTES:])
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False
        """Whether a stop string has ended the text."""

    def push(self, token: int) -> str:
        """Return the text that is certain with this token."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(_INCOMPLETE) and len(self._pending) < _MOST_BYTES:
            return ""
        self._before, self._pending = self._pending, []
        return self._until_stop(text)

    def close(self) -> str:
        """Return what was held back."""
        text = self._until_stop(self._new_text()) if self._pending else ""
        held, self._pending, self._held = self._held, [], ""
        return text + held

    def _new_text(self) -> str:
        before = self._decode(self._before)
        return self._decode([*self._before, *self._pending])[len(before) :]

    def _until_stop(self, text: str) -> str:
        """Return the text before a stop string, without a tail that may become one."""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        tail = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - tail :]
        return text[: len(text) - tail]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
