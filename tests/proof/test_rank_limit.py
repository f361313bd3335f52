"""Layouts of more ranks than a proof starts are refused, by the name of the command."""

from __future__ import annotations

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.rank_limit import MAX_RANKS, validate_ranks


def test_too_many_ranks_are_refused() -> None:
    validate_ranks(ParallelLayout.parse(f"cp={MAX_RANKS}"), "verify", "what is proved")
    message = r"32 ranks; gathers starts at most 16 here\. .*: which gathers there are depends on"
    with pytest.raises(UserError, match=message):
        validate_ranks(ParallelLayout.parse("cp=32"), "gathers", "which gathers there are")
