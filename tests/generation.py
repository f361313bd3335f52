"""Small models for tests of generation."""

from __future__ import annotations

from typing import Any

import torch

from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from tests.bare import build_chunks, make_config

MAMBA3 = {"mode": "mamba3", "mamba_num_heads": 8}
VECTORS = {"num_moe_experts": 32}
"""Megatron's router computes a float32 sigmoid whatever the model is, and torch rounds what is left
beyond whole vectors of 32 differently: with fewer experts the eighth digit of a token's logits
depends on its place in the batch."""
CASES: dict[str, dict[str, Any]] = {
    "A": tiny_model("AA"),
    "M": tiny_model("MM"),
    "M one group": tiny_model("MM", mamba_num_groups=1),
    "mamba3": tiny_model("MM", **MAMBA3),
    "mamba3 mimo": tiny_model("MM", **MAMBA3, mamba3_mimo_rank=3, mamba3_output_norm=True),
    "R": tiny_model("RR"),
    "R short filter": tiny_model("RR", m2rnn_conv_kernel=1),
    "R depth state": tiny_model("RFR", m2rnn_depth_state=True),
    "E": tiny_model("EE", **VECTORS),
    "F": tiny_model("FF"),
    "AEMR": tiny_model("AEMR", **VECTORS),
    "AEMR mamba3": tiny_model("AEMRF", **MAMBA3, **VECTORS),
}


def random_model(model: dict[str, Any], layout: str = "tp=1", weights: str | None = None) -> Any:
    """Build a model in float64, with the given weights or all parameters random."""
    parsed = ParallelLayout.parse(layout)
    start_model_parallel(parsed)
    (chunk,) = chunks = build_chunks(make_config(StepSpec(model, dtype="float64"), parsed), parsed)
    if weights is not None:
        load_weights(chunks, weights)
        return chunk.eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in chunk.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise
    return chunk.eval()
