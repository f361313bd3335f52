"""The tests with ranks run in one process, on one pool."""

from __future__ import annotations

import pytest


def test_a_worker_knows_the_groups(request: pytest.FixtureRequest) -> None:
    """A pytest that pytest-xdist does not know yet loses them without a word."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("all tests run in this process")
    assert request.node.nodeid.endswith(f"@{request.path}")
