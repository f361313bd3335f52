"""The deal over cp on every supported Megatron-Core: by its own group, and no other."""

from __future__ import annotations

import pytest
import torch

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.sequence_layout import split_batch_for_cp
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool


def _tokens_here(layout: ParallelLayout) -> list[int]:
    start_model_parallel(layout)
    batch = {"tokens": torch.arange(8)[None], "labels": None}
    return split_batch_for_cp(batch)["tokens"][0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # From 0.18 on, no group means all ranks: TP=2 would halve the row.
        ("tp=2,etp=1", [list(range(8))] * 2),
        ("cp=2", [[0, 1, 6, 7], [2, 3, 4, 5]]),
    ],
)
def test_a_row_is_dealt_over_cp_alone(
    ranks: WorkerPool, text: str, expected: list[list[int]]
) -> None:
    assert ranks.run(2, _tokens_here, ParallelLayout.parse(text)) == expected
