"""Which cases of a long list `make test` runs; the others are slow ones, for `make test-all`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nemo_megacpp.layout import ParallelLayout

SLOW = (pytest.mark.slow,)


def slow_if(condition: bool) -> Sequence[Any]:
    """Return the marks of a case that is slow under ``condition``."""
    return SLOW if condition else ()


def small_or_last(layout: str, layouts: Sequence[str]) -> bool:
    """Whether ``layout`` has at most two ranks or is the last of ``layouts``.

    The lists end with a combination of axes, or with the most stages, which `make test` should not
    leave to the slow ones.
    """
    return ParallelLayout.parse(layout).world <= 2 or layout == layouts[-1]
