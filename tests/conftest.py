"""Fixtures shared by all tests, and the markers that `make check` and `make test` select by."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_megacpp.runtime.workers import WorkerPool

_MARKERS = {"ranks": "ranks", "interpreter": "processes"}
"""Marker by fixture, of the fixtures that start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses such a fixture, directly or through others."""
    for item in items:
        for fixture in _MARKERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(_MARKERS[fixture])


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerPool]:
    """Four gloo ranks, started once for the whole session."""
    with WorkerPool(4) as pool:
        yield pool
