"""What is not sharded: a file in 0.16, an object among the tensors from 0.19 on."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.core.checkpoints import COMMON, keep_common_file
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool


def _save(folder: str) -> None:
    """Save as Megatron's own scripts do."""
    start_model_parallel(ParallelLayout())
    Path(folder).mkdir()
    state = {"iteration": 7, "weight": ShardedTensor.from_rank_offsets("weight", torch.ones(3))}
    dist_checkpointing.save(state, folder)


def test_both_forms_are_read(ranks: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000007"
    ranks.run(1, _save, str(folder))
    found = CheckpointContent(folder)
    assert (found.step, list(found.tensors), found.objects) == (7, ["weight"], [])
    keep_common_file(folder)
    assert torch.load(folder / COMMON)["iteration"] == CheckpointContent(folder).step == 7
