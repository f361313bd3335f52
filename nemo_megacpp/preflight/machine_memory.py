"""Validates that a run's weights, gradients and optimizer state fit in this machine's memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import job_of
from nemo_megacpp.render import show_memory
from nemo_megacpp.runtime.host import current_host

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_BYTES = 16
"""Of a parameter: at least its weight, gradient and Adam's state."""


def validate_memory(recipe: Recipe, local_ranks: int) -> None:
    """Refuse a model that this machine cannot hold; activations are not counted.

    Args:
        recipe: with its vocabulary, in a legal layout.
        local_ranks: of the run, on this machine.

    Raises:
        UserError: with what a rank needs and what there is.
    """
    on_gpus = current_host().device == "cuda"
    there = _of_gpu() if on_gpus else _of_machine()
    if _most_parameters(recipe) * _BYTES <= there:
        return
    plan = make_plan(job_of(recipe))
    held = [
        stage.memory.total - stage.memory.activations
        for stage in plan.stages
        for _ in range(stage.ranks)
    ]
    needed = max(held) if on_gpus else sum(sorted(held)[:local_ranks])
    if needed <= there:
        return
    whose = "a rank of it" if on_gpus else f"the {local_ranks} ranks on this machine"
    raise UserError(
        f"The model has {plan.parameters:,} parameters: {whose} would hold {show_memory(needed)} "
        f"of weights, gradients and optimizer state, and {'a GPU' if on_gpus else 'the machine'} "
        f"has {show_memory(there)}. Choose a smaller model, or spread it over more "
        f"{'GPUs' if on_gpus else 'machines'}; 'plan' shows what takes the memory."
    )


def _most_parameters(recipe: Recipe) -> int:
    """Return more parameters than any model of these sizes has, which is cheap to tell."""
    sizes = {name: value for name, value in recipe.model.items() if type(value) is int}
    hidden, get = sizes["hidden_size"], sizes.get
    experts = get("num_moe_experts", 1) * get("moe_ffn_hidden_size", 0)
    inner = get("mamba_num_heads", 1) * get("mamba_head_dim", 0)
    inner += get("num_attention_heads", 1) * get("kv_channels", 0)
    inner += get("m2rnn_num_heads", 1) * get("m2rnn_value_head_dim", 0)
    shared = get("moe_shared_expert_intermediate_size", 0) + get("ffn_hidden_size", 0)
    layer = hidden * (16 * (hidden + inner) + 3 * (experts + shared))
    return 2 * hidden * (sizes["vocab_size"] + 65536) + sizes["num_layers"] * layer


def _of_gpu() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _of_machine() -> int:
    """Return the memory and swap of this machine, or of the container that limits it."""
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        there = min(there, int(_CGROUP.read_text()))
    return there
