"""Time a training step with each form of recompute beside the same step that saves everything, and
compare the memory that each needs.

    python -m benchmarks.recompute
    python -m benchmarks.recompute --device cuda

The peer is our own stack without recompute. Losses and gradients must be equal, on a CPU in every
bit, or the script fails. A ratio below one is the price in time, one above it what is saved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from benchmarks.harness import Row, Sample, common_arguments, finish, paired, peak_bytes, start
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel, start_process_group
from nemo_megacpp.specs.hybrid_model import build_hybrid_model

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "mamba_state_dim": 64,
    "mamba_num_groups": 2,
    "m2rnn_num_heads": 16,
    "m2rnn_key_head_dim": 64,
    "m2rnn_value_head_dim": 16,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "moe_router_topk": 2,
    "vocab_size": 1024,
    "seq_length": 512,
}
QUICK: dict[str, Any] = {**SIZES, "seq_length": 128}
PATTERN = "ARMEMEME"
FORMS: dict[str, dict[str, Any]] = {
    "selective: mamba": {"recompute_modules": ["mamba"]},
    "selective: m2rnn": {"recompute_modules": ["m2rnn"]},
    "selective: core_attn, moe, mamba, m2rnn": {
        "recompute_modules": ["core_attn", "moe", "mamba", "m2rnn"]
    },
    "full: block, first 4": {"recompute_method": "block", "recompute_num_layers": 4},
    "full: uniform, 1 at a time": {"recompute_method": "uniform", "recompute_num_layers": 1},
    "full: uniform, 4 at a time": {"recompute_method": "uniform", "recompute_num_layers": 4},
}
GPU_ROUNDING = 1e-2
"""Largest difference of a gradient, relative to its largest element: atomic adds on a GPU."""


def build(sizes: dict[str, Any], device: torch.device, **form: Any) -> torch.nn.Module:
    """Return the model with a form of recompute."""
    if form:
        form["recompute_granularity"] = "selective" if "recompute_modules" in form else "full"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = {"hybrid_pattern": PATTERN, **sizes, **form}
    config = HybridConfig(**config_fields(model, ParallelLayout(), dtype, device.type))
    return build_hybrid_model(config).to(device)


def stepper(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a forward and backward pass over ``tokens [b, s + 1]``, which returns its loss."""
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=tokens.device)[None]

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=False)  # their memory is not compared
        loss = model(inputs, positions, None, labels=labels).mean()
        loss.backward()
        return loss.detach()

    return step


def check(ours: torch.nn.Module, plain: torch.nn.Module, exact: bool) -> None:
    """Raise if a gradient differs."""
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        gap = (mine.grad - theirs.grad).abs().max()
        if gap > (0.0 if exact else GPU_ROUNDING * theirs.grad.abs().max()):
            raise ValueError(f"{name}: gradients differ by up to {float(gap)}")


def main() -> int:
    """Compare every form with none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    arguments = parser.parse_args()
    device = start(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start_process_group(0, 1, f"file://{folder}/store")
        start_model_parallel(ParallelLayout())
        sizes = QUICK if arguments.quick else SIZES
        plain = build(sizes, device)
        weights = deepcopy(plain.state_dict())
        tokens = torch.randint(sizes["vocab_size"], (1, sizes["seq_length"] + 1), device=device)
        base = stepper(plain, tokens)
        base()  # a first run warms up, and allocates the gradients
        saved = Sample([float(peak_bytes(base, device))], "B")
        shown = f"{PATTERN} h={sizes['hidden_size']} s={sizes['seq_length']}"
        for name, form in FORMS.items():
            model = build(sizes, device, **form)
            model.load_state_dict(weights)
            step = stepper(model, tokens)
            if not torch.equal(step(), base()) and device.type == "cpu":
                raise ValueError(f"{name}: another loss")
            check(model, plain, exact=device.type == "cpu")
            times = paired(step, base, repeats=arguments.repeats, device=device)
            memory = Sample([float(peak_bytes(step, device))], "B")
            rows.append(Row(f"step, {name}", *times, "no recompute", shown))
            rows.append(Row(f"memory, {name}", memory, saved, "no recompute", shown))
        torch.distributed.destroy_process_group()
    return finish(arguments, rows)


if __name__ == "__main__":
    sys.exit(main())
