"""Inference state: what a layer keeps of one sequence between two of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class KeptState(NamedTuple):
    """A tensor that a layer keeps of one sequence while it generates.

    Attributes:
        what: its name.
        bytes: on one rank, of one token if ``per_token``, else once.
        per_token: whether it grows with the sequence.
    """

    what: str
    bytes: int
    per_token: bool = False


def constant(kept: Iterable[KeptState]) -> int:
    """Return the bytes of a sequence of any length."""
    return sum(item.bytes for item in kept if not item.per_token)


def per_token(kept: Iterable[KeptState]) -> int:
    """Return the bytes that each token adds."""
    return sum(item.bytes for item in kept if item.per_token)


def no_state(_: object) -> list[KeptState]:
    """Return the state of a layer that computes each token alone."""
    return []
