"""Megatron's mixture of experts: what builds it, and what it logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.core.releases import is_at_least

try:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
except ImportError:  # until 0.17
    from megatron.core.transformer.moe import moe_utils

    get_moe_metrics_tracker = None

_BUILDS_EXPERTS = (
    "moe_use_legacy_grouped_gemm"
    not in signature(BackendSpecProvider.grouped_mlp_modules).parameters
)

AUX_LOSS_COUNTS_SHARES = is_at_least("0.19")
"""Whether the router scales its auxiliary losses by the ranks that route one microbatch when
``calculate_per_token_loss`` is on. No signature shows it."""


def experts_of(experts: type, submodules: Any) -> Any:
    """Return what ``grouped_mlp_modules`` of a backend returns: class and submodules, or from 0.17
    on one callable that builds them."""
    return partial(experts, submodules=submodules) if _BUILDS_EXPERTS else (experts, submodules)


def replace_experts(found: Any, replace: Callable[[type], type]) -> Any:
    """Return what ``grouped_mlp_modules`` returned, with another class of experts."""
    if isinstance(found, partial):
        return partial(replace(found.func), *found.args, **found.keywords)  # type: ignore[arg-type]
    experts, submodules = found
    return replace(experts), submodules


def moe_spec(backend: BackendSpecProvider, router: type, shared_expert: type) -> Any:
    """Return the spec of Megatron's ``MoELayer`` with a router and a shared expert of ours."""
    # Megatron's helper only checks that there are experts; the configuration counts them.
    moe: Any = get_moe_module_spec_for_backend(backend, num_experts=1, moe_grouped_gemm=True)
    if isinstance(moe, ModuleSpec):
        moe.submodules.router = router
        moe.submodules.shared_experts.module = shared_expert
        return moe
    submodules = moe.keywords["submodules"]
    submodules.router = router
    mlp: MLPSubmodules = submodules.shared_experts.keywords["submodules"]
    submodules.shared_experts = partial(shared_expert, submodules=mlp)
    return moe


def logged_aux_losses() -> Mapping[str, torch.Tensor]:
    """Return what the routers of this rank have logged since the last clearing: by name, a value
    for each layer of the model, and beyond them for each prediction depth."""
    if get_moe_metrics_tracker is None:
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        return {name: entry["values"] for name, entry in tracker.items() if "values" in entry}
    return {name: entry.values for name, entry in get_moe_metrics_tracker().metrics.items()}


def clear_aux_losses() -> None:
    """Forget what was logged."""
    if get_moe_metrics_tracker is None:
        moe_utils.clear_aux_losses_tracker()
    else:
        get_moe_metrics_tracker().clear()
