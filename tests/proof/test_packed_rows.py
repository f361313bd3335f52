"""Rows of the data, packed: each document as if alone, and the same loss in every layout."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.data.packed_rows import open_epoch
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.documents import packed_seq_params
from nemo_megacpp.mixers.sequence_layout import split_batch_for_cp
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config, save_initial_weights

SEQ_LENGTH = 64


Row = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """A row of short documents of multiples of four tokens: for CP=2, and for the router."""
    texts = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"{number} words" + " and more" * (number % 7))
    out = tmp_path_factory.mktemp("packed") / "data"
    options = {"vocab_size": 270, "held_out": 0.3, "document_multiple": 4}
    data = prepare([texts], out, **options, progress=False)
    dataset = open_epoch(data, SEQ_LENGTH, 1, packed=True)
    return {name: value[None].numpy() for name, value in dataset[0].items()}


def _spec(pattern: str, **changes: Any) -> StepSpec:
    # A vocabulary that is padded to the same size in every layout.
    model = {**tiny_model(pattern, **changes), "vocab_size": 310, "seq_length": SEQ_LENGTH}
    return StepSpec(model, dtype="float64")


def _batch(row: Row) -> tuple[dict[str, torch.Tensor], PackedSeqParams]:
    batch = {name: torch.from_numpy(value) for name, value in row.items()}
    return batch, packed_seq_params(batch.pop("document_start"))


def logits_of_documents(spec: StepSpec, weights: str, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of a packed row, and those of each of its documents alone: ``[s, v]``."""
    layout = ParallelLayout()
    start_model_parallel(layout, spec.seed)
    chunks = build_chunks(make_config(spec, layout), layout)
    load_weights(chunks, weights)
    batch, packed = _batch(row)
    tokens, positions = batch["tokens"], batch["position_ids"]
    bounds = packed.cu_seqlens_q.tolist()
    assert len(bounds) > 4
    with torch.no_grad():
        together = chunks[0](tokens, positions, None, packed_seq_params=packed)
        alone = [chunks[0](tokens[:, a:b], positions[:, a:b], None) for a, b in pairwise(bounds)]
    return together[0].numpy(), torch.cat(alone, dim=1)[0].numpy()


def loss_of_row(spec: StepSpec, layout: ParallelLayout, weights: str, row: Row) -> float:
    """Return the loss of a packed row, summed over its tokens that have one."""
    start_model_parallel(layout, spec.seed)
    chunks = build_chunks(make_config(spec, layout), layout)
    load_weights(chunks, weights)
    batch, packed = _batch(row)
    batch = split_batch_for_cp(batch, packed)
    with torch.no_grad():
        losses = chunks[0](
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            packed_seq_params=packed,
        )
    total = (losses * batch["loss_mask"]).sum().double()
    torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return float(total)


@pytest.mark.parametrize("mode", ["nemo_native", "mamba3"])
def test_a_document_in_a_row_is_as_alone(
    ranks: WorkerPool, tmp_path: Path, row: Row, mode: str
) -> None:
    spec = _spec("AMER", mode=mode)
    weights = str(tmp_path)
    ranks.run(1, save_initial_weights, spec, ParallelLayout(), weights)
    together, alone = ranks.run(1, logits_of_documents, spec, weights, row)[0]
    assert together.dtype == np.float64
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-9)


def test_layouts_give_the_same_loss(ranks: WorkerPool, tmp_path: Path, row: Row) -> None:
    spec = _spec("AMER", mode="mamba3")
    weights = str(tmp_path)
    ranks.run(1, save_initial_weights, spec, ParallelLayout(), weights)
    expected = ranks.run(1, loss_of_row, spec, ParallelLayout(), weights, row)[0]
    assert expected > 1.0
    for text in ("tp=2,etp=1", "cp=2"):
        layout = ParallelLayout.parse(text)
        for total in ranks.run(2, loss_of_row, spec, layout, weights, row):
            # Megatron's cross entropy computes in float32.
            assert total == pytest.approx(expected, rel=1e-5), text
