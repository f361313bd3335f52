"""The random numbers of every rank go on where they were, in the layout where they were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemo_megacpp.checkpoint.dcp import save_sharded
from nemo_megacpp.checkpoint.random_state import (
    load_random_state,
    random_state,
    set_random_state,
    sharded_random_state,
)
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool

TRACKED = "model-parallel-rng"


def _draw() -> list[float]:
    default = torch.rand(2).tolist()
    with get_cuda_rng_tracker().fork(TRACKED):
        return default + torch.rand(2).tolist()


def _save(layout: ParallelLayout, folder: str) -> Any:
    start_model_parallel(layout)
    _draw()
    state = random_state()
    save_sharded({"random_state": sharded_random_state(state)}, folder)
    following = _draw()
    set_random_state(state)
    again = _draw()
    return following, again, _draw()


def _load(layout: ParallelLayout, folder: str) -> Any:
    start_model_parallel(layout, seed=99)
    assert not list(dist_checkpointing.load_common_state_dict(folder)), "plain tensors, no pickle"
    state = load_random_state(folder)
    if state is None:
        return None
    set_random_state(state)
    return _draw()


def test_every_rank_goes_on_in_its_own_layout(ranks: WorkerPool, tmp_path: Path) -> None:
    folder, layout = str(tmp_path / "state"), ParallelLayout.parse("tp=2")
    saved = ranks.run(2, _save, layout, folder)
    for following, again, later in saved:
        assert again == following
        assert later != following, "the kept state is not what the generators use"
    first, second = (following for following, _, _ in saved)
    assert first[:2] == second[:2] and first[2:] != second[2:], "ranks differ where they should"
    assert ranks.run(2, _load, layout, folder) == [first, second]
    for other in ("pp=2", "tp=1,world=2", "tp=2,world=4"):
        place = ParallelLayout.parse(other)
        assert ranks.run(place.world, _load, place, folder) == [None] * place.world
