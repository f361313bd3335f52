from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_megacpp.runtime.workers import WorkerPool
from tests.hf.cases import CASES
from tests.hf.models import save_with_logits


@pytest.fixture(scope="session")
def saved(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the checkpoint of a case; ``logits.pt`` lies beside it. Only read it."""
    root = tmp_path_factory.mktemp("hf")
    folders = {name: root / str(number) / "step=3" for number, name in enumerate(CASES)}
    ranks.run(1, save_with_logits, [str(f) for f in folders.values()], list(CASES.values()))
    return lambda name: folders[name]
