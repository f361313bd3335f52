"""How Megatron's model is told of a pattern that it may not know."""

from __future__ import annotations

import pytest

from nemo_megacpp.core.model import chunk_at, stand_in_pattern
from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import HybridPattern


@pytest.mark.parametrize(
    ("text", "chunks", "expected"),
    [
        ("AEMR", 1, "*EMM"),
        ("AEM|RF", 2, "*EM|M-"),
        ("AEMRF", 1, "*EMM-"),
        ("AEMAEM", 2, "*EM|*EM"),
    ],
)
def test_stand_ins_have_the_cuts(text: str, chunks: int, expected: str) -> None:
    assert stand_in_pattern(HybridPattern.parse(text), chunks) == expected


CHUNKS = (range(0, 3), range(3, 5))


def test_the_stack_divides_where_the_model_does_not() -> None:
    assert chunk_at(CHUNKS, None, 0, ours=1) == range(3, 5)


def test_the_models_selection_goes_first() -> None:
    """Megatron's scripts build every virtual stage with the same spec."""
    assert chunk_at(CHUNKS, ["M", "-"], 3, ours=0) == range(3, 5)


@pytest.mark.parametrize(("symbols", "offset"), [("MM", 0), ("MMM", 3), ("MMMMM", 0)])
def test_other_cuts_are_refused(symbols: str, offset: int) -> None:
    with pytest.raises(UserError, match=r"chunks at 0 to 2, 3 to 4. Give both the same depth"):
        chunk_at(CHUNKS, list(symbols), offset, ours=0)
