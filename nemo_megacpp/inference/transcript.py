"""Completions that grow at the same time, written one after another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_megacpp.printable import printable


@dataclass
class Transcript:
    """Writes prompts and their completions to standard output, in the order of the prompts.

    The text of the first completion that has not ended is written as it comes, the text of later
    ones when it is their turn.

    Attributes:
        texts: of the prompts.
    """

    texts: Sequence[str]
    _now: int = -1
    _kept: dict[int, str] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)

    def __call__(self, index: int, text: str, ended: bool) -> None:
        """Take new text of a completion; see :data:`nemo_megacpp.inference.completions.Emit`."""
        if self._now < 0:
            self._begin()
        self._kept[index] = self._kept.get(index, "") + text
        if ended:
            self._ended.add(index)
        while self._now < len(self.texts):
            self._write(self._kept.pop(self._now, ""))
            if self._now not in self._ended:
                return
            self._write("\n")
            self._begin()

    def _begin(self) -> None:
        self._now += 1
        if self._now < len(self.texts):
            if len(self.texts) > 1:
                self._write(f"--- {self._now + 1} of {len(self.texts)}\n")
            self._write(self.texts[self._now])

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()
