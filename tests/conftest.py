"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_megacpp.runtime.workers import WorkerPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerPool]:
    """Four gloo ranks, started once for the whole session."""
    with WorkerPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[WorkerPool]:
    """One rank for each GPU, up to four; skips where there is no GPU."""
    gpus = min(torch.cuda.device_count(), 4)
    if not gpus:
        pytest.skip("needs a GPU")
    with WorkerPool(gpus, device="cuda") as pool:
        yield pool
