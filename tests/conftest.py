"""Fixtures shared by all tests, and the markers that `make check` and `make test` select by.

The fixtures import what they need: pytest-xdist's own process, which runs no test, reads these
files before it starts the others, and the libraries take ten seconds.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nemo_megacpp.nemo.versions import describe_mismatch
from tests.needs_nemo import NEEDS_NEMO

if TYPE_CHECKING:
    from nemo_megacpp.runtime.workers import WorkerPool

pytest_plugins = ["tests.shared_data", "tests.reference"]

NO_NEMO = describe_mismatch()
"""Why NeMo is not there, None if it is."""

CACHE = Path(__file__).parents[1] / "data"
"""Ignored by Git, removed by ``make clean``."""

_MARKERS = {"ranks": "ranks", "interpreter": "processes"}
"""Marker by fixture, of the fixtures that start processes."""


class _NeedsNemo(pytest.File):
    """Stands for a file of tests that cannot be imported without NeMo."""

    def collect(self) -> Iterator[pytest.Item]:
        yield _Skipped.from_parent(self, name="needs_nemo")


class _Skipped(pytest.Item):
    def runtest(self) -> None:
        assert NO_NEMO is not None
        pytest.skip(f"{NEEDS_NEMO[_below_tests(self.path)]}; {NO_NEMO}")


def _below_tests(path: Path) -> str:
    return str(path.relative_to(Path(__file__).parent))


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Any:
    if NO_NEMO is None or _below_tests(module_path) not in NEEDS_NEMO:
        return None
    return _NeedsNemo.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses such a fixture, directly or through others.

    Where the tests run in several processes, those with ranks share one pool in one of them, and
    those of a module share its fixtures.
    """
    for item in items:
        for fixture in _MARKERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(_MARKERS[fixture])
        group = "ranks" if item.get_closest_marker("ranks") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_configure() -> None:
    """Suspend the collector while the tests, and all that they import, are collected.

    Caches, such as the built-in corpus, are written into the checkout and not into the home folder.

    A test computes on one thread, and so do the processes that it starts: two pytest processes with
    two threads each on two cores took four times the CPU time, waiting for each other's threads.

    An interrupt is not ignored, as it is in what a shell has put into the background: tests send
    interrupts to themselves and to the processes that they start, which inherit it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["XDG_CACHE_HOME"] = str(CACHE)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerPool]:
    """A pool of four gloo ranks for the whole session."""
    from nemo_megacpp.runtime.workers import WorkerPool

    with WorkerPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[WorkerPool]:
    """One rank for each GPU, up to four; skips where there is no GPU."""
    import torch

    from nemo_megacpp.runtime.workers import WorkerPool

    gpus = min(torch.cuda.device_count(), 4)
    if not gpus:
        pytest.skip("needs a GPU")
    with WorkerPool(gpus, device="cuda") as pool:
        yield pool
