"""Rows that pack several documents: each as if alone, and the same numbers in every layout.

Where there is an E block, ranks hold multiples of four tokens: Megatron's router takes its sigmoid
in float32, and torch on a CPU rounds what remains beyond full vectors (32 numbers) another way.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.sequence_layout import split_batch_for_cp, token_order
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.gather import GlobalValues, shard_values
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from tests.bare import build_chunks, make_config
from tests.path import run_step
from tests.proof.cases import FAMILIES
from tests.reference import Reference
from tests.selection import slow_if

DOCUMENTS = (5, 2, 7, 2)


def _spec(model: dict[str, Any], documents: tuple[int, ...], **changes: Any) -> StepSpec:
    model = {**model, "seq_length": sum(documents)}
    return StepSpec(model, objective="logits", dtype="float64", documents=documents, **changes)


def _hold(ranks: WorkerPool, reference: Reference, spec: StepSpec, *layouts: str) -> None:
    weights, expected = reference(spec)
    for text in layouts:
        layout = ParallelLayout.parse(text)
        result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
        broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
        assert not broken, (text, broken)


@pytest.mark.parametrize("mode", ["nemo_native", pytest.param("mamba3", marks=pytest.mark.slow)])
def test_packs_in_layouts(ranks: WorkerPool, reference: Reference, mode: str) -> None:
    spec = _spec(tiny_model("AMER", mode=mode), DOCUMENTS)
    _hold(ranks, reference, spec, "tp=2,etp=1", "pp=2", "tp=2,pp=2,etp=1", "ep=2")


# -- context parallelism ---------------------------------------------------------------------------

ALONE = {
    label: model
    for label, model, _ in FAMILIES
    if label in ("A", "M", "M3", "M3-mimo", "R", "R-serial")
}


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=slow_if("-" in label)) for label in ALONE]
)
def test_packs_of_a_family_under_cp(ranks: WorkerPool, reference: Reference, label: str) -> None:
    """With CP=4 the first document is the shortest there can be: one token a chunk."""
    spec = _spec(ALONE[label], (8, 24, 16), global_batch_size=2)
    _hold(ranks, reference, spec, "cp=4", "tp=2,cp=2")


@pytest.mark.parametrize(
    ("mode", "layouts"),
    [
        ("nemo_native", ("tp=2,cp=2,etp=1", "cp=2,ep=2")),
        pytest.param("nemo_native", ("cp=2", "cp=2,pp=2"), marks=pytest.mark.slow),
        ("mamba3", ("tp=2,cp=2,ep=2,etp=1",)),
    ],
)
def test_packs_of_families_together_under_cp(
    ranks: WorkerPool, reference: Reference, mode: str, layouts: tuple[str, ...]
) -> None:
    spec = _spec(tiny_model("AEMR", mode=mode), (12, 4, 16), global_batch_size=2)
    _hold(ranks, reference, spec, *layouts)


def _dealt_as_one_document(spec: StepSpec, layout: ParallelLayout, weights: GlobalValues) -> Any:
    with mock.patch(
        "nemo_megacpp.mixers.microbatch.split_batch_for_cp",
        lambda batch, packed: split_batch_for_cp(batch),
    ):
        return run_step(spec, layout, weights)


@pytest.mark.parametrize("label", ["A", "M", "R-serial"])
def test_a_pack_dealt_as_one_document_is_seen(
    ranks: WorkerPool, reference: Reference, label: str
) -> None:
    """One zigzag over the whole pack would be another order: the proof must tell them apart."""
    spec = _spec(ALONE[label], (8, 24, 16), global_batch_size=2)
    weights, expected = reference(spec)
    layout = ParallelLayout.parse("cp=2")
    result = ranks.run(2, _dealt_as_one_document, spec, layout, weights)[0]
    broken = [check.name for check in compare(expected, result, FLOAT64) if not check.passed]
    assert broken[:1] == ["forward"]


# -- against documents alone -----------------------------------------------------------------------

REAL, PADDED = (4, 8, 12), (8, 8, 16)


def _tokens(document: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(document)
    return torch.randint(tiny_model("A")["vocab_size"], (1, REAL[document]), generator=generator)


def _model(spec: StepSpec, cp: int, weights: GlobalValues) -> torch.nn.Module:
    layout = ParallelLayout(context_parallel_size=cp)
    start_model_parallel(layout, spec.seed)
    chunks = build_chunks(make_config(spec, layout), layout)
    shard_values(chunks, weights)
    return chunks[0]


def _alone(spec: StepSpec, weights: GlobalValues) -> list[np.ndarray]:
    """Logits ``[s, v]`` of each document as a row of its own."""
    model = _model(spec, 1, weights)
    with torch.no_grad():
        return [model(_tokens(i), None, None)[0].numpy() for i in range(len(REAL))]


def _packed(spec: StepSpec, cp: int, weights: GlobalValues) -> tuple[np.ndarray, np.ndarray]:
    """On a rank: logits ``[s/cp, v]`` of its tokens of the padded pack, and their positions."""
    model = _model(spec, cp, weights)
    starts = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (REAL, PADDED)]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts[0],
        cu_seqlens_kv=starts[0],
        cu_seqlens_q_padded=starts[1],
        cu_seqlens_kv_padded=starts[1],
        max_seqlen_q=max(PADDED),
        max_seqlen_kv=max(PADDED),
    )
    padding = [torch.full((1, b - a), 117) for a, b in zip(REAL, PADDED, strict=True)]
    row = torch.cat([t for i in range(len(REAL)) for t in (_tokens(i), padding[i])], dim=1)
    share = split_batch_for_cp({"tokens": row}, packed)["tokens"]
    rank = parallel_state.get_context_parallel_rank()
    with torch.no_grad():
        logits = model(share, None, None, packed_seq_params=packed)[0]
    return logits.numpy(), token_order(row.size(1), cp, packed).of_rank(rank).numpy()


@pytest.mark.parametrize("mode", ["nemo_native", "mamba3"])
def test_a_document_in_a_pack_is_as_if_alone(
    ranks: WorkerPool, reference: Reference, mode: str
) -> None:
    """Every token sees its own document up to itself, and not its padding."""
    spec = _spec(tiny_model("AEMR", mode=mode), (12, 4, 16), global_batch_size=2)
    weights, _ = reference(spec)
    expected = ranks.run(1, _alone, spec, weights)[0]
    for cp in (1, 2):
        shares = ranks.run(cp, _packed, spec, cp, weights)
        row = np.empty((sum(PADDED), shares[0][0].shape[-1]))
        for logits, positions in shares:
            row[positions] = logits
        for value, (start, _) in zip(expected, pairwise([0, *accumulate(PADDED)]), strict=True):
            found = row[start : start + len(value)]
            assert abs(found - value).max() <= 1e-12 * abs(value).max(), cp


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({}, "cp=2", "Packed documents with CP=2: .* document 0 has 5, 1 has 2, 2 has 7, 3 has 2"),
        ({"micro_batch_size": 2}, "cp=1", "packed documents is one row.* micro_batch_size=[12]"),
    ],
)
def test_refusals(
    ranks: WorkerPool, reference: Reference, changes: dict[str, Any], layout: str, message: str
) -> None:
    model = tiny_model("AMER")
    weights, _ = reference(_spec(model, DOCUMENTS))
    spec, where = _spec(model, DOCUMENTS, **changes), ParallelLayout.parse(layout)
    with pytest.raises(WorkerError, match=message):
        ranks.run(where.world, run_step, spec, where, weights)
