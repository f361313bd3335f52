"""Documents of a pack are apart in Megatron's Mamba mixer, on every supported Megatron-Core."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.documents import packed_seq_params
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import disturb
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config

LENGTHS = (6, 10)


def _marked() -> PackedSeqParams:
    starts = torch.zeros(1, sum(LENGTHS), dtype=torch.bool)
    starts[0, [0, LENGTHS[0]]] = True
    return packed_seq_params(starts)


def _without_total() -> PackedSeqParams:
    """As a caller makes it who does not know that from 0.17 on ``total_tokens`` is read."""
    bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    longest = max(LENGTHS)
    return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)


PACKS = {"marked": _marked, "without total_tokens": _without_total, "none": lambda: None}


def _second_document(pack: str) -> list[np.ndarray]:
    """Return the logits of the second document after two first documents."""
    layout = ParallelLayout()
    start_model_parallel(layout)
    spec = StepSpec(tiny_model("MM", position_embedding_type="none"), dtype="float64")
    (chunk,) = chunks = build_chunks(make_config(spec, layout), layout)
    disturb(spec, chunks)
    positions = torch.arange(sum(LENGTHS))[None]
    logits = []
    for first in (1, 2):
        tokens = torch.full((1, sum(LENGTHS)), 3)
        tokens[0, : LENGTHS[0]] = first
        whole = chunk(tokens, positions, None, packed_seq_params=PACKS[pack]())
        logits.append(whole[0, LENGTHS[0] :].detach().numpy())
    return logits


@pytest.mark.parametrize("pack", [name for name in PACKS if name != "none"])
def test_a_document_does_not_see_the_one_before(ranks: WorkerPool, pack: str) -> None:
    """Bit for bit; Mamba's state and its convolution both start anew."""
    one, other = ranks.run(1, _second_document, pack)[0]
    assert np.array_equal(one, other)


def test_without_a_pack_it_does(ranks: WorkerPool) -> None:
    """The comparison can fail: as one document, the row's end depends on its start."""
    one, other = ranks.run(1, _second_document, "none")[0]
    assert not np.array_equal(one, other)
