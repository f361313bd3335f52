"""Causal attention of the torch backend: grouped queries, packs and context parallelism."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.sequence_layout import token_order

NARROWEST_HEAD = 16
"""Channels. Narrower heads are padded with zeros up to this: torch's CPU kernel takes half the time
with 16 channels of what it takes with 8."""


def validate_torch_attention(config: TransformerConfig) -> None:
    """Validate what :class:`TorchCoreAttention` supports.

    Raises:
        UserError: a softmax other than the plain one, or a sliding window.
    """
    if config.softmax_type != "vanilla" or config.window_size is not None:
        raise UserError(
            "The torch core attention has softmax_type='vanilla' and no sliding window; got "
            f"softmax_type={config.softmax_type!r}, window_size={config.window_size}."
        )


class TorchCoreAttention(MegatronModule):
    """Scaled dot-product attention, ``softmax(q kᵀ · scale) v``, causal.

    Stock ``DotProductAttention`` refuses CP and packs. Here, under CP, keys and values are gathered
    over cp (their gradients are reduce-scattered back) and the causal mask is drawn from global
    positions, so the zigzag order in which Megatron deals tokens to ranks needs no undoing.

    Query ``[s/cp, b, n/tp, d]``, key and value ``[s/cp, b, g/tp, d]`` (``[t/cp, n, d]`` for packs
    in ``thd`` format); output ``[s/cp, b, n/tp·d]``. Varying on tp (heads) and on cp (sequence).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise UserError(
                f"The torch core attention is causal; the spec asks for {attn_mask_type.name}."
            )
        validate_torch_attention(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        assert attention_bias is None, "attention_bias is not part of a causal hybrid stack"
        packed = query.dim() == 3
        if packed:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        mask = self._mask(query.size(0), packed_seq_params, query.device)
        if self.cp_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(t, group=self.cp_group) for t in (key, value)
            )
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        width = query.size(-1)
        scale = 1 / math.sqrt(width) if self.softmax_scale is None else self.softmax_scale
        if width < NARROWEST_HEAD:
            zeros = (0, NARROWEST_HEAD - width)
            query, key, value = (F.pad(t, zeros) for t in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # Ranks of a tensor-parallel group hold different heads: different masks. With SP the stack
        # draws from the tracker already.
        fork = dropout > 0.0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.size(1) != key.size(1),
            )
        context = context[..., :width].permute(2, 0, 1, 3).flatten(2)
        return context.squeeze(1) if packed else context

    def _mask(
        self, local_length: int, packed: PackedSeqParams | None, device: torch.device
    ) -> torch.Tensor | None:
        """Return a boolean mask ``[s/cp, s]`` in rank order, or None where plain causal will do."""
        cp = self.cp_group.size()
        if cp == 1 and packed is None:
            return None
        order = token_order(local_length * cp, cp, packed, device)
        mine, all_keys = order.of_rank(self.cp_group.rank()), order.positions
        mask = mine[:, None] >= all_keys[None, :]
        if order.documents is not None:
            mask &= order.documents[mine][:, None] == order.documents[all_keys][None, :]
        return mask
