"""The blocks F and E: a dense MLP, and a mixture of experts with its router."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_nemo_megacpp import NemoMegacppConfig
from .parts_nemo_megacpp import NormProjection, Projection

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activate(config: NemoMegacppConfig, x: Tensor) -> Tensor:
    """Apply the activation of an expert or an MLP, with its gate if it has one."""
    function = ACTIVATIONS[config.activation]
    if not config.gated_linear_unit:
        return function(x)
    gate, up = x.chunk(2, dim=-1)
    if (most := config.activation_func_clamp_value) is not None:
        gate, up = gate.clamp(max=most), up.clamp(min=-most, max=most)
    return function(gate) * (up + config.glu_linear_offset)


class DenseMLP(nn.Module):
    """F: Megatron's ``MLP`` behind a norm."""

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.config = config
        width, bias = config.ffn_hidden_size, config.add_bias_linear
        rows = width * (2 if config.gated_linear_unit else 1)
        self.linear_fc1 = NormProjection(
            config.hidden_size, rows, config.layernorm_epsilon, bias=bias
        )
        self.linear_fc2 = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.linear_fc1(self.linear_fc1.norm(hidden))
        return self.linear_fc2(activate(self.config, rows))


class Bank(nn.Module):
    """Holds a matrix for each expert, ``weight [experts, out, in]``."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))


class Router(nn.Module):
    """Holds ``weight [experts, h]`` and the bias that moves the choice, not the probability."""

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))
        self.expert_bias = None
        if config.moe_router_enable_expert_bias:  # moved by the load of the experts, not learnt
            zeros = torch.zeros(config.num_moe_experts)
            self.expert_bias = nn.Parameter(zeros, requires_grad=False)


class MixtureOfExperts(nn.Module):
    """E: Megatron's ``MoELayer``, expert after expert."""

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        twice = 2 if config.gated_linear_unit else 1
        self.router = Router(config)
        self.experts = nn.Module()
        self.experts.experts = nn.Module()
        bank = self.experts.experts
        bank.linear_fc1 = Bank(config.num_moe_experts, hidden, twice * width)
        bank.linear_fc2 = Bank(config.num_moe_experts, width, hidden)
        if shared := config.moe_shared_expert_intermediate_size:
            self.shared_experts = nn.Module()
            self.shared_experts.linear_fc1 = Projection(hidden, twice * shared)
            self.shared_experts.linear_fc2 = Projection(shared, hidden)
            if config.moe_shared_expert_gate:
                self.shared_experts.gate_weight = nn.Parameter(torch.empty(1, hidden))

    def forward(self, normed: Tensor) -> Tensor:
        tokens = normed.flatten(0, 1)
        probs, chosen = self._route(tokens)
        bank = self.experts.experts
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            places, slots = torch.where(chosen == expert)
            x, weight = tokens[places], probs[places, slots, None]
            if self.config.moe_apply_probs_on_input:
                x, weight = (weight * x).to(x.dtype), torch.ones_like(weight)
            inner = activate(self.config, F.linear(x, bank.linear_fc1.weight[expert]))
            inner = (inner * weight).to(inner.dtype)
            output.index_add_(0, places, F.linear(inner, bank.linear_fc2.weight[expert]))
        output = output.view_as(normed)
        if self.config.moe_shared_expert_intermediate_size:
            output = output + self._shared(normed)
        return output

    def _shared(self, normed: Tensor) -> Tensor:
        shared = self.shared_experts
        output = shared.linear_fc2(activate(self.config, shared.linear_fc1(normed)))
        if self.config.moe_shared_expert_gate:
            output = output * torch.sigmoid(F.linear(normed, shared.gate_weight))
        return output

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and experts, ``[tokens, topk]``."""
        config, topk = self.config, self.config.moe_router_topk
        kinds = {"fp32": torch.float32, "fp64": torch.float64}
        kind = kinds.get(config.moe_router_dtype, tokens.dtype)
        logits = F.linear(tokens.to(kind), self.router.weight.to(kind))
        # Megatron computes the scores in float32, whatever the logits are.
        if config.moe_router_score_function == "sigmoid":
            scores = torch.sigmoid(logits.float()).to(kind)
            biased = scores if self.router.expert_bias is None else scores + self.router.expert_bias
            chosen = self._choose(biased)
            probs = scores.gather(1, chosen)
            if topk > 1:
                probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
        elif config.moe_router_pre_softmax:
            scores = torch.softmax(logits, dim=-1, dtype=torch.float32).to(kind)
            chosen = self._choose(scores)
            probs = scores.gather(1, chosen)
        else:
            chosen = self._choose(logits)
            probs = torch.softmax(logits.gather(1, chosen), dim=-1, dtype=torch.float32).to(kind)
        if config.moe_router_topk_scaling_factor:
            probs = probs * config.moe_router_topk_scaling_factor
        return probs, chosen

    def _choose(self, scores: Tensor) -> Tensor:
        config, topk = self.config, self.config.moe_router_topk
        if config.moe_router_group_topk:
            groups = scores.unflatten(-1, (config.moe_router_num_groups, -1))
            best = groups.topk(topk // config.moe_router_group_topk, dim=-1)[0].sum(-1)
            kept = best.topk(config.moe_router_group_topk, dim=-1)[1]
            outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            scores = groups.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(1)
        return scores.topk(topk, dim=-1)[1]
