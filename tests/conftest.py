"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_megacpp.runtime.workers import WorkerPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerPool]:
    """Four gloo ranks, started once for the whole session."""
    with WorkerPool(4) as pool:
        yield pool
