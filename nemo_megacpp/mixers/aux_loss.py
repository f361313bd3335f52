"""Auxiliary losses of the E blocks, averaged over E blocks on every pipeline stage alike.

Megatron's tracker divides by all layers, and both it and NeMo reduce only the names that a rank
happens to hold: a stage without an E block then misses a collective. Here the names and sizes come
from the configuration, so every stage takes part in the same reductions.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.core.moe import clear_aux_losses, logged_aux_losses

_NAMES = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}


def balancing_kinds(config: TransformerConfig) -> list[str]:
    """Return the balancing losses that ``config`` turns on, in Megatron's names."""
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients] * len(kinds)
    pairs = zip(kinds, coefficients, strict=True)
    return [kind for kind, coefficient in pairs if kind in _NAMES and coefficient]


def aux_loss_names(config: HybridConfig) -> list[str]:
    """Return the tracker's names of the auxiliary losses that ``config`` turns on."""
    if config.num_expert_blocks == 0:
        return []
    names = [_NAMES[kind] for kind in balancing_kinds(config)]
    return names + (["z_loss"] if config.moe_z_loss_coeff else [])


def reduced_aux_losses(config: HybridConfig, scale: float = 1.0) -> dict[str, float]:
    """Return each auxiliary loss, averaged over E blocks and data-parallel ranks, and clear them.

    A collective over the world's pipeline, tensor, context and data groups: every rank must call.

    Args:
        config: of the model.
        scale: one over the number of microbatches that were accumulated.
    """
    tracker = logged_aux_losses()
    places = config.num_layers + (config.mtp_num_layers or 0)
    reduced = {}
    for name in aux_loss_names(config):
        logged = tracker.get(name)
        # On the device: NCCL reduces nothing else.
        device = torch.cuda.current_device()
        values = torch.zeros(places, dtype=torch.float64, device=device)
        if logged is not None:
            values += logged.double()
        tokens = parallel_state.get_tensor_and_context_parallel_group()
        rows = parallel_state.get_data_parallel_group()
        torch.distributed.all_reduce(values, group=tokens)
        torch.distributed.all_reduce(values, group=rows)
        # A rank's balancing loss is its tokens' share of the sum; the others are means.
        if name == "z_loss":
            values /= tokens.size()
        values /= rows.size()
        torch.distributed.all_reduce(
            values, group=parallel_state.get_pipeline_model_parallel_group()
        )
        reduced[name] = float(values.sum()) * scale / config.num_expert_blocks
    clear_aux_losses()
    return reduced
