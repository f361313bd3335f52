"""Causal attention of the torch backend: grouped queries, packs and context parallelism."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

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
from nemo_megacpp.mixers.kernels.block_attention import Dropout
from nemo_megacpp.mixers.ring_attention import ring_attention
from nemo_megacpp.mixers.sequence_layout import (
    TokenOrder,
    heads_to_sequence,
    sequence_to_heads,
    token_order,
)

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

    Stock ``DotProductAttention`` refuses CP and packs. Under CP, ``cp_comm_type`` chooses how
    queries and keys meet, as in Transformer Engine:

    * ``p2p`` (Megatron's default): keys and values travel in a ring
      (:mod:`nemo_megacpp.mixers.ring_attention`);
    * ``all_gather``: keys and values are gathered over cp (their gradients are reduce-scattered
      back). The mask is drawn from global positions, so the zigzag order needs no undoing;
    * ``a2a``: an all-to-all exchanges tokens for heads, before and after. CP must divide the KV
      heads of a rank.

    Query ``[s/cp, b, n/tp, d]``, key and value ``[s/cp, b, g/tp, d]`` (``[t/cp, n, d]`` for packs
    in ``thd`` format); output ``[s/cp, b, n/tp·d]``. Varying on tp (heads) and on cp (sequence).

    Raises:
        UserError: a mask, softmax or window that it has not, or heads that ``a2a`` cannot split.
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
        self.cp_comm_type = cp_comm_type or "p2p"
        kv_heads = config.num_query_groups // pg_collection.tp.size()
        if self.cp_comm_type == "a2a" and kv_heads % self.cp_group.size():
            raise UserError(
                f"cp_comm_type='a2a' splits the {kv_heads} KV heads of a rank over "
                f"CP={self.cp_group.size()}, which does not divide them. Use 'p2p' or 'all_gather'."
            )
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
        cp = self.cp_group.size()
        if attn_mask_type == AttnMaskType.arbitrary or key.size(0) != query.size(0):
            # Inference: the keys before the queries come from a cache.
            assert cp == 1 and not packed, "the stack refuses these with an inference context"
            return self._attend_cache(query, key, value, attn_mask_type, attention_mask)
        order = token_order(query.size(0) * cp, cp, packed_seq_params, query.device)
        if cp == 1:
            context = self._attend(query, key, value, _mask_in_order(order))
        else:
            exchange = {"p2p": self._ring, "all_gather": self._gathered, "a2a": self._exchanged}
            context = exchange[self.cp_comm_type](query, key, value, order)
        return context.squeeze(1) if packed else context

    def _attend_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask_type: AttnMaskType | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention of the last tokens to all: those that ``attention_mask``
        ``[b, 1, s, t]`` leaves with an ``arbitrary`` mask, else the ones up to each token's own."""
        if attn_mask_type == AttnMaskType.arbitrary:
            assert attention_mask is not None
            return self._attend(query, key, value, ~attention_mask)
        keys = torch.arange(key.size(0), device=key.device)
        seen = keys[key.size(0) - query.size(0) :, None] >= keys
        return self._attend(query, key, value, seen)

    def _ring(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, order: TokenOrder
    ) -> torch.Tensor:
        dropout = None
        if self.dropout and self.training:
            with self._drop_apart():
                seed = torch.randint(2**31, (), device=query.device)
            dropout = Dropout(self.dropout, int(seed))
        scale = self._scale(query)
        return ring_attention(query, key, value, order, self.cp_group, scale, dropout)

    def _gathered(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, order: TokenOrder
    ) -> torch.Tensor:
        key, value = (
            gather_from_sequence_parallel_region(t, group=self.cp_group) for t in (key, value)
        )
        mask = _mask(order, order.of_rank(self.cp_group.rank()), order.positions)
        return self._attend(query, key, value, mask)

    def _exchanged(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, order: TokenOrder
    ) -> torch.Tensor:
        width = query.size(-1)
        query, key, value = (
            sequence_to_heads(t.flatten(2), self.cp_group, order).unflatten(2, (-1, width))
            for t in (query, key, value)
        )
        context = self._attend(query, key, value, _mask_in_order(order))
        return heads_to_sequence(context, self.cp_group, order)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention to keys and values that are all here; no mask: plain causal."""
        # [s, b, n, d] -> [b, n, s, d]
        scale, width = self._scale(query), query.size(-1)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if width < NARROWEST_HEAD:
            zeros = (0, NARROWEST_HEAD - width)
            query, key, value = (F.pad(t, zeros) for t in (query, key, value))
        with self._drop_apart():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.size(1) != key.size(1),
            )
        return context[..., :width].permute(2, 0, 1, 3).flatten(2)

    def _scale(self, query: torch.Tensor) -> float:
        return 1 / math.sqrt(query.size(-1)) if self.softmax_scale is None else self.softmax_scale

    def _drop_apart(self) -> AbstractContextManager[None]:
        """Draw from the tracker: the ranks of a tensor-parallel group hold different heads, so they
        need different masks. With SP the stack draws from the tracker already."""
        drops = self.training and self.dropout > 0.0
        fork = drops and not self.config.sequence_parallel
        return get_cuda_rng_tracker().fork() if fork else nullcontext()


def _mask(order: TokenOrder, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return which of the tokens ``keys`` each of ``queries`` sees, by their global positions."""
    mask = queries[:, None] >= keys[None, :]
    if order.documents is not None:
        mask &= order.documents[queries][:, None] == order.documents[keys][None, :]
    return mask


def _mask_in_order(order: TokenOrder) -> torch.Tensor | None:
    """Return the mask of a whole row in order; None where plain causal will do."""
    if order.documents is None:
        return None
    everywhere = torch.arange(order.boundaries[-1], device=order.positions.device)
    return _mask(order, everywhere, everywhere)
