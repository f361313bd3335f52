"""A router whose expert capacity does not depend on the layout."""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter

from nemo_megacpp.mixers.sequence_layout import token_order


class CapacityRouter(TopKRouter):
    """Megatron's ``TopKRouter``, with tokens dropped over the whole microbatch.

    Stock Megatron-Core drops over the tokens that a rank happens to hold: with SP or CP the
    capacity is a smaller number and other tokens are dropped. Here the routing probabilities of a
    microbatch are gathered over tp and cp, and the stock rule is applied to all of them.
    Without ``moe_expert_capacity_factor`` this is ``TopKRouter``, but for two things: the counts
    that move the expert bias stay exact in a bfloat16 model, and with ``calculate_per_token_loss``
    the auxiliary losses weigh as they do on one rank (:func:`_scale_auxiliary_losses`).
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ):
        undropped = copy.copy(config)
        undropped.moe_expert_capacity_factor = None
        super().__init__(config=undropped, pg_collection=pg_collection)
        self.capacity_factor = config.moe_expert_capacity_factor
        if config.calculate_per_token_loss:
            _scale_auxiliary_losses(undropped, self.tp_cp_group.size())

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the token counts in float32, as Megatron keeps the bias: ``Float16Module`` converts
        both, and bfloat16 counts to 256 only."""
        super()._maintain_float32_expert_bias()
        counts = self.local_tokens_per_expert
        if counts is not None and counts.dtype != torch.float32:
            counts.data = counts.data.to(torch.float32)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[s, b, experts]``; return probabilities and map, ``[tokens, experts]``."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self.capacity_factor is None:
            return probs, routing_map
        kept = self._within_capacity(probs.detach(), batch=logits.size(1)) & routing_map
        if self.enable_expert_bias and torch.is_grad_enabled():
            # The stock router counts a token for the balance of experts only if it is kept.
            self.local_tokens_per_expert += kept.sum(0) - routing_map.sum(0)
        return probs * kept, kept

    def _within_capacity(self, probs: torch.Tensor, batch: int) -> torch.Tensor:
        """Return which of this rank's choices ``[tokens, experts]`` the experts have room for."""
        group, cp = self.tp_cp_group, self.cp_group.size()
        everyone = [torch.empty_like(probs) for _ in range(group.size())]
        torch.distributed.all_gather(everyone, probs.contiguous(), group=group)
        # In the order of the sequence, so that equal probabilities are dropped alike everywhere.
        length = probs.size(0) // batch * group.size()
        order = token_order(length, cp, device=probs.device)
        gathered = torch.cat(everyone).view(length, batch, -1)
        ordered = gathered[order.places].view(length * batch, -1)
        # A chosen expert's probability is positive, so the map need not travel.
        _, kept = apply_router_token_dropping(
            ordered, ordered > 0, self.topk, self.capacity_factor, drop_policy="probs"
        )
        mine = order.positions.chunk(group.size())[group.rank()]
        return kept.view(length, batch, -1)[mine].flatten(0, 1)


def _scale_auxiliary_losses(config: TransformerConfig, shares: int) -> None:
    """Make the auxiliary losses of a router's own ``config`` weigh alike in every layout.

    With ``calculate_per_token_loss`` Megatron-Core 0.16.1 multiplies them by the tokens that one
    rank routes, and later divides all gradients by the tokens of the global batch: where ``shares``
    ranks route one microbatch, their part is that many times too small. What is logged is divided
    by the coefficients, so it does not change.
    """
    balancing = config.moe_aux_loss_coeff
    config.moe_aux_loss_coeff = (
        [coefficient * shares for coefficient in balancing]
        if isinstance(balancing, list)
        else balancing * shares
    )
    if config.moe_z_loss_coeff is not None:
        config.moe_z_loss_coeff *= shares
