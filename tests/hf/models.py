"""Checkpoints of small models, each with the logits that Megatron computes from it in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.checkpoint.described import actual_model
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.checkpoint.manifest import FILE, write_manifest
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import disturb
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from tests.bare import build_chunks, make_config
from tests.hf.float64 import Float64

LENGTH = 76
"""Tokens of a row: Mamba-2's scan takes 64 at a time."""
ROWS = 2
LOGITS = "logits.pt"


def spec(pattern: str, **fields: Any) -> StepSpec:
    """Return a small float64 model of a vocabulary that is padded."""
    model = tiny_model(pattern, **{"vocab_size": 90, "seq_length": LENGTH, **fields})
    return StepSpec(model, dtype="float64")


def save_with_logits(folders: list[str], specs: list[StepSpec]) -> None:
    """Save every model into its folder, as a run does, with tokens and logits beside it."""
    layout = ParallelLayout.parse("tp=1")
    start_model_parallel(layout)
    for folder, each in zip(map(Path, folders), specs, strict=True):
        config = make_config(each, layout)
        chunks = build_chunks(config, layout)
        disturb(replace(each, seed=each.seed + 1), chunks)
        for module in chunks[0].modules():
            if getattr(module, "expert_bias", None) is not None:
                module.expert_bias.copy_(torch.linspace(-0.2, 0.3, len(module.expert_bias)))
        (folder / "weights").mkdir(parents=True)
        save_model(chunks, folder / "weights")
        identity = {
            "model": actual_model(config, each.model),
            "layout": layout.short(),
            "tokenizer": None,
            "manifest": FILE,
        }
        write_identity(folder, identity, 3)
        write_manifest(folder)
        torch.save(run(chunks[0].eval(), each.model["vocab_size"]), folder.parent / LOGITS)


@torch.no_grad()
def run(model: torch.nn.Module, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens ``[b, s]`` and Megatron's logits ``[b, s, rows]``."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(vocab_size, (ROWS, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    with Float64():
        return tokens, model(tokens, positions, None)
