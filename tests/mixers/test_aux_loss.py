"""Auxiliary losses: names from the configuration, averages over E blocks on every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    get_moe_layer_wise_logging_tracker,
    save_to_aux_losses_tracker,
)

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.aux_loss import aux_loss_names, reduced_aux_losses
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config, microbatches

SEQUENCE, Z = "seq_load_balancing_loss", "z_loss"


@pytest.mark.parametrize(
    ("pattern", "changes", "names"),
    [
        ("AE", {}, [SEQUENCE]),
        ("AE", {"moe_z_loss_coeff": 1e-3}, [SEQUENCE, Z]),
        ("AE", {"moe_aux_loss_coeff": 0.0}, []),
        ("AE", {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 1e-3}, [Z]),
        ("AE", {"moe_router_load_balancing_type": "none"}, []),
        ("AE", {"moe_router_load_balancing_type": "aux_loss"}, ["load_balancing_loss"]),
        (
            "AE",
            {
                "moe_router_load_balancing_type": ["aux_loss", "none", "seq_aux_loss"],
                "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
            },
            ["load_balancing_loss", SEQUENCE],
        ),
        ("AM", {"moe_z_loss_coeff": 1e-3}, []),
    ],
)
def test_names(pattern: str, changes: dict[str, Any], names: list[str]) -> None:
    assert aux_loss_names(HybridConfig(**tiny_model(pattern, **changes))) == names


PATTERN = "AEM|ER|AM|E"


def _reduced(text: str, scale: float) -> tuple[dict[str, float], dict[str, float], set[str]]:
    """Record losses for this stage's E blocks only; reduce twice."""
    layout = ParallelLayout.parse(text)
    start_model_parallel(layout)
    config = HybridConfig(**tiny_model(PATTERN, moe_z_loss_coeff=1e-3))
    rank = torch.distributed.get_rank()
    chunk = config.pattern.chunks(4)[rank] if layout.pp == 4 else range(config.num_layers)
    for layer in chunk:
        if PATTERN.replace("|", "")[layer] == "E":
            # A power of two for each layer: no two sets of layers have the same sum.
            for name, factor in ((SEQUENCE, 1.0), (Z, 0.5)):
                loss = torch.tensor(factor * 2.0**layer)
                save_to_aux_losses_tracker(name, loss, layer + 1, config.num_layers)
    held = set(get_moe_layer_wise_logging_tracker())
    return reduced_aux_losses(config, scale), reduced_aux_losses(config, scale), held


def test_averaged_over_expert_blocks(ranks: WorkerPool) -> None:
    """Three E blocks of eight layers; the third stage holds none and takes part all the same."""
    total = 2.0**1 + 2.0**3 + 2.0**7
    results = ranks.run(4, _reduced, "pp=4", 0.5)
    assert [bool(held) for *_, held in results] == [True, True, False, True]
    for reduced, again, _ in results:
        assert reduced == {SEQUENCE: 0.5 * total / 3, Z: 0.25 * total / 3}
        assert again == {SEQUENCE: 0.0, Z: 0.0}, "the tracker is cleared"


@pytest.mark.parametrize(
    ("layout", "factor"), [("pp=1", 1), ("tp=2", 2), ("cp=2", 2), ("world=2", 1)]
)
def test_shares_are_summed_and_rows_averaged(ranks: WorkerPool, layout: str, factor: int) -> None:
    """Over tp and cp a balancing loss is a sum of shares and the z loss a mean; over dp both are
    means."""
    total = 2.0**1 + 2.0**3 + 2.0**7
    for reduced, _, _ in ranks.run(ParallelLayout.parse(layout).world, _reduced, layout, 1.0):
        assert reduced == {SEQUENCE: factor * total / 3, Z: 0.5 * total / 3}


def _with_and_without_documents() -> list[dict[str, float]]:
    """Return the auxiliary losses of a row as a pack of documents, and as one document."""
    spec = StepSpec(tiny_model("E"), documents=(4, 12))
    start_model_parallel(ParallelLayout())
    config = make_config(spec, ParallelLayout())
    (chunk,) = build_chunks(config, ParallelLayout())
    batch = next(microbatches(spec))
    found = []
    for packed in (batch["packed_seq_params"], None):
        chunk(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed)
        found.append(reduced_aux_losses(config))
    return found


def test_experts_are_balanced_over_rows_not_documents(ranks: WorkerPool) -> None:
    """A row of packed documents counts as one sequence, whole."""
    packed, whole = ranks.run(1, _with_and_without_documents)[0]
    assert set(packed) == {SEQUENCE}
    assert packed == whole
