"""Settings that the hybrid stack would not read are refused, not ignored."""

from __future__ import annotations

import pytest

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.proof.cases import tiny_model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers_in_first_pipeline_stage", 1),
        ("num_layers_in_last_pipeline_stage", 1),
        ("account_for_embedding_in_pipeline_split", True),
        ("account_for_loss_in_pipeline_split", True),
        ("pipeline_model_parallel_layout", "Et|tL"),
        ("recompute_granularity", "full"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("mode", "mamba9"),
        ("m2rnn_kernel", "cuda"),
        ("mamba3_kernel", "cuda"),
    ],
)
def test_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        HybridConfig(**tiny_model("AEMR", **{field: value}))


def test_accepted() -> None:
    assert HybridConfig(**tiny_model("AEMR")).num_layers == 4
