"""Validation of packed rows before the first layer runs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_context_parallel
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.moe_layer import MoELayer

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.sequence_layout import TokenOrder, token_order


def check_packs(
    packed: PackedSeqParams,
    hidden_states: torch.Tensor,
    rotary_length: int | None,
    layers: Iterable[torch.nn.Module],
    config: TransformerConfig,
    cp: int,
) -> None:
    """Validate a pack for a stack.

    Args:
        packed: the documents of the row.
        hidden_states: ``[s, b, h]``, this rank's share.
        rotary_length: positions that the rotary embedding has, None without one.
        layers, config, cp: of the stack.

    Raises:
        UserError: the format is not ``thd``; a microbatch has several rows; the pack brings its own
            cp group; the documents fit neither the row nor CP
            (:func:`nemo_megacpp.mixers.sequence_layout.token_order`) nor the rotary embedding; or,
            with CP > 1, a family cannot honour the order of a pack.
    """
    if packed.qkv_format != "thd":
        raise UserError(
            f"Packed sequences must have qkv_format='thd', got {packed.qkv_format!r}. Rows of one "
            f"document need no PackedSeqParams."
        )
    share, rows = hidden_states.shape[:2]
    if rows != 1:
        raise UserError(
            f"A microbatch of packed sequences is one row; this one has {rows}. Set "
            f"micro_batch_size=1 and pack more documents into the row."
        )
    if packed.local_cp_size is not None or packed.cp_group is not None:
        raise UserError(
            f"PackedSeqParams brings a context-parallel group of its own "
            f"(local_cp_size={packed.local_cp_size}); the hybrid stack has one CP={cp} for all "
            f"rows. Leave local_cp_size and cp_group unset."
        )
    gathered = config.tensor_model_parallel_size if config.sequence_parallel else 1
    order = token_order(share * gathered * cp, cp, packed, hidden_states.device)
    layers = list(layers)
    attends = any(isinstance(getattr(layer, "self_attention", None), Attention) for layer in layers)
    if attends and rotary_length is not None:
        _check_rotary_embedding(packed, order, rotary_length)
    if cp > 1:
        _check_order_is_honoured(layers, config, cp)


def _check_rotary_embedding(packed: PackedSeqParams, order: TokenOrder, positions: int) -> None:
    """Megatron's rotates document by document, and no tokens outside of documents."""
    bounds = (
        packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    )
    *_, start, end = order.boundaries
    if len(order.boundaries) > len(bounds):
        raise UserError(
            f"The documents of a pack end at token {start} and its row has {end}: attention gives "
            f"the {end - start} tokens beyond no position. Make them a document."
        )
    longest = max(end - start for start, end in pairwise(order.boundaries))
    if longest > positions:
        raise UserError(
            f"PackedSeqParams has max_seqlen_q={packed.max_seqlen_q}, max_seqlen_kv="
            f"{packed.max_seqlen_kv}, and the longest document with its padding has {longest} "
            f"tokens: set max_seqlen_q to at least {longest}."
        )


def _check_order_is_honoured(
    layers: list[torch.nn.Module], config: TransformerConfig, cp: int
) -> None:
    mixers = [getattr(layer, "mixer", getattr(layer, "mlp", None)) for layer in layers]
    capacity = config.moe_expert_capacity_factor
    if capacity is not None and any(isinstance(mixer, MoELayer) for mixer in mixers):
        raise UserError(
            f"Packed sequences with CP={cp} and moe_expert_capacity_factor={capacity}: which of "
            f"two equally probable tokens is dropped depends on their order, which "
            f"Megatron's MoELayer does not get. Leave the capacity factor unset, or use "
            f"CP=1."
        )
    if any(isinstance(mixer, MambaMixer) for mixer in mixers):
        validate_native_mamba(cp)


def validate_native_mamba(cp: int) -> None:
    """Refuse packs for Megatron's ``MambaMixer`` with CP > 1 where it cannot take them.

    Raises:
        UserError: Transformer Engine is not installed, or too old.
    """
    if mamba_context_parallel.tex is None:
        raise UserError(
            f"Packed sequences with CP={cp}: Megatron's MambaMixer takes the order of a pack from "
            f"Transformer Engine >= 1.10 (thd_get_partitioned_indices), which is not installed. "
            f"Install it, choose mode='mamba3', or use CP=1."
        )
