"""Megatron's MoE modules, corrected so that the layout does not change what they compute."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from nemo_megacpp.core.moe import AUX_LOSS_COUNTS_SHARES
from nemo_megacpp.mixers.parameter_gather import wait_for_parameters
from nemo_megacpp.mixers.sequence_layout import token_order

_tagged: dict[type, type] = {}


def tag_expert_weights(experts: torch.nn.Module) -> None:
    """Assign every weight of ``experts`` to the expert groups of DDP and the optimizer, and let
    the gradient norm count it on every rank; see :func:`with_expert_tags`."""
    for name, parameter in experts.named_parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]
        if not getattr(parameter, "tensor_model_parallel", False):
            by_rows = parameter.dim() == 2 and "linear_fc2" in name
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = int(by_rows)  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]


def with_expert_tags(experts: type) -> type:
    """Return a subclass of one of Megatron's expert modules whose weights are tagged.

    Megatron-Core 0.16.1 tags an expert weight as expert-parallel (``allreduce = False``) only if
    EP > 1. With EP=1 and an expert-tensor-parallel degree other than TP, the expert-data-parallel
    group differs from the data-parallel one, and a weight tagged as dense is reduced over the wrong
    one: with TP=2, ETP=1 its gradient is never summed over the two ranks that see different tokens.
    Here every expert weight is tagged, in every layout. Where the groups coincide the numbers stay
    the same, and the optimizer has one structure in all layouts, so that its state can be
    resharded.

    The gradient norm counts a parameter on every rank that holds its own part only if it has
    ``tensor_model_parallel``. Transformer Engine's grouped linear does not always set it: with EP
    or ETP above 1 Megatron-Core builds it without a parallel mode, and Transformer Engine 2.13 and
    newer then leave the tags out. The norm would count the experts of the first tensor-parallel
    rank only, and clipping would be too weak (pull request 5916 of Megatron-LM). Here every expert
    weight has it: the optimizer sums the norm over the expert groups, in which no two ranks hold
    the same expert weight.

    Args:
        experts: ``SequentialMLP``, ``GroupedMLP`` or ``TEGroupedMLP``.
    """
    if experts not in _tagged:

        class TaggedExperts(experts):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                tag_expert_weights(self)

        TaggedExperts.__name__ = f"Tagged{experts.__name__}"
        TaggedExperts.__qualname__ = TaggedExperts.__name__
        _tagged[experts] = TaggedExperts
    return _tagged[experts]


class SharedExpert(SharedExpertMLP):
    """Megatron's ``SharedExpertMLP``, correct under ``overlap_param_gather``.

    With ``moe_shared_expert_overlap`` the token dispatcher calls parts of the shared expert and
    never its ``forward``, so nothing waits for the gather of its gate's weight.
    """

    def pre_forward_comm(self, input: torch.Tensor) -> None:
        """Gather the input over tp, and compute the gate; see Megatron's."""
        wait_for_parameters(self)
        super().pre_forward_comm(input)


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
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **of_release: Any,
    ):
        undropped = copy.copy(config)
        undropped.moe_expert_capacity_factor = None
        super().__init__(config=undropped, pg_collection=pg_collection, **of_release)
        self.capacity_factor = config.moe_expert_capacity_factor
        if config.calculate_per_token_loss and not AUX_LOSS_COUNTS_SHARES:
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
        """Return which of this rank's choices ``[tokens, experts]`` are within the capacity."""
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
