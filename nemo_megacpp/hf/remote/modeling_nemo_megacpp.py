"""A hybrid language model that ``nemo-megacpp checkpoint export --to hf`` has written.

Modules and parameters have the names of the checkpoint, so that the export changes no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nemo_megacpp import NemoMegacppConfig
from .mixers_nemo_megacpp import M2RNN, Mamba2, Mamba3, NormProjection, Projection, Scale, State

# Parts of the names of parameters that stay float32 in a model of bfloat16 or float16.
FLOAT32 = {
    *("A_log", "dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"),
    "expert_bias",
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class HybridCache:
    """What the layers keep of a sequence: keys and values of A, convolution windows and states of
    M and R.

    Keys and values grow with the sequence, everything else has a fixed size.
    """

    is_compileable = False

    def __init__(self, layers: int):
        self.states: list[State] = [{} for _ in range(layers)]
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens the states hold."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` of every state, as beam search asks for."""
        for state in self.states:
            for name, tensor in state.items():
                state[name] = tensor.index_select(0, beam_idx.to(tensor.device))


class Attention(nn.Module):
    """Megatron's ``SelfAttention``: rows by group, ``q… (gate…) k v``; RoPE over halves."""

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.config = config
        self.heads, self.groups, self.dim = (
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
        )
        self.per_group = self.heads // self.groups
        queries = self.per_group * (2 if config.attention_output_gate else 1)
        self.sizes = [
            self.per_group * self.dim,
            *([self.per_group * self.dim] if config.attention_output_gate else []),
            self.dim,
            self.dim,
        ]
        self.linear_qkv = NormProjection(
            config.hidden_size,
            self.groups * (queries + 2) * self.dim,
            config.layernorm_epsilon,
            bias=config.add_bias_linear or config.add_qkv_bias,
        )
        self.linear_proj = nn.Linear(
            self.heads * self.dim, config.hidden_size, bias=config.add_bias_linear
        )

    def forward(
        self, hidden: Tensor, positions: Tensor, visible: Tensor | None, state: State
    ) -> Tensor:
        rows = self.linear_qkv(self.linear_qkv.norm(hidden)).unflatten(-1, (self.groups, -1))
        q, *gate, k, v = rows.split(self.sizes, dim=-1)
        q = q.reshape(*hidden.shape[:2], self.heads, self.dim)
        if self.config.position_embedding_type == "rope":
            q, k = (self._rotate(t, positions) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if state:
            k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        state["k"], state["v"] = k, v
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            is_causal=visible is None and q.size(2) > 1,
            scale=self.config.softmax_scale or 1 / math.sqrt(self.dim),
            enable_gqa=self.heads != self.groups,
        )
        context = context.transpose(1, 2).flatten(2)
        if gate:
            opened = torch.sigmoid(gate[0].flatten(2).float())
            context = (context * opened).to(context.dtype)
        return self.linear_proj(context)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate channels ``(i, i + d/2)`` of ``[b, s, n, dim]``, the first ``rotary_percent``."""
        turned = self.dim
        if self.config.rotary_percent < 1:
            turned = int(self.dim * self.config.rotary_percent)
        powers = torch.arange(0, turned, 2, dtype=torch.float32, device=x.device) / turned
        angle = positions.to(powers.dtype)[..., None] * (1.0 / self.config.rotary_base**powers)
        angle = torch.cat([angle, angle], dim=-1)[:, :, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        x, rest = x[..., :turned], x[..., turned:]
        first, second = x.chunk(2, dim=-1)
        x = x * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([x, rest], dim=-1)


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


class Layer(nn.Module):
    """One block of the pattern, with its norm and its residual."""

    def __init__(self, config: NemoMegacppConfig, letter: str):
        super().__init__()
        self.letter, self.eps = letter, config.layernorm_epsilon
        if letter == "A":
            self.self_attention = Attention(config)
        elif letter == "F":
            self.mlp = DenseMLP(config)
        elif letter == "E":
            self.pre_mlp_layernorm = Scale(config.hidden_size)
            self.mlp = MixtureOfExperts(config)
        elif letter == "M" and config.mode == "nemo_native":
            self.mixer = Mamba2(config)
        else:
            self.norm = Scale(config.hidden_size)
            self.mixer = M2RNN(config) if letter == "R" else Mamba3(config)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        mask: Tensor | None,
        state: State,
        depth: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states ``[b, s, h]`` and what R blocks hand on in depth."""
        if self.letter == "A":
            return hidden + self.self_attention(hidden, positions, visible, state), depth
        if self.letter == "F":
            return hidden + self.mlp(hidden), depth
        if self.letter == "E":
            return hidden + self.mlp(self._normed(hidden, self.pre_mlp_layernorm)), depth
        if isinstance(self.mixer, Mamba2):
            return hidden + self.mixer(hidden, mask, state), depth
        normed = self._normed(hidden, self.norm)
        if isinstance(self.mixer, M2RNN):
            output, depth = self.mixer(normed, mask, state, depth)
            return hidden + output, depth
        return hidden + self.mixer(normed, mask, state), depth

    def _normed(self, x: Tensor, norm: Scale) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, self.eps)


class Decoder(nn.Module):
    """The layers, and the norm behind them."""

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, letter) for letter in config.pattern)
        self.final_norm = Scale(config.hidden_size)
        self.eps = config.layernorm_epsilon

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        mask: Tensor | None,
        states: list[State],
    ) -> Tensor:
        depth = None
        for layer, state in zip(self.layers, states, strict=True):
            hidden, depth = layer(hidden, positions, visible, mask, state, depth)
        return F.rms_norm(hidden, self.final_norm.weight.shape, self.final_norm.weight, self.eps)


class NemoMegacppForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder with an embedding before it and a head behind it, or the embedding as the head."""

    config_class = NemoMegacppConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: NemoMegacppConfig):
        super().__init__(config)
        self.embedding = nn.Module()
        self.embedding.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        if not config.tie_word_embeddings:
            self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        named = self.named_parameters()
        names = {part for name, _ in named for part in name.split(".")}
        self._keep_in_fp32_modules_strict = sorted(FLOAT32 & names)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights alone: an export holds all of them."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "output_layer", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output_layer = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is a HybridCache, which forward makes

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return the logits ``[b, s, vocabulary]``.

        Args:
            input_ids: ``[b, s]``, the tokens behind those of the cache.
            attention_mask: ``[b, past + s]``, 0 at padding, which stands on the left.
            past_key_values: of the calls before; grows in place.
            inputs_embeds: ``[b, s, h]``, instead of ``input_ids``.
            labels: ``[b, s]``, for a loss over the next tokens; -100 is left out.
            use_cache: return the cache.
            logits_to_keep: of the last tokens only; 0: of all.
            return_dict: False returns a tuple.

        Raises:
            ValueError: padding within or behind the tokens, with recurrent layers in the model.
        """
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        keep = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        if not isinstance(cache, HybridCache):
            cache = HybridCache(len(self.decoder.layers))
        positions, visible, mask = self._masks(attention_mask, hidden, cache.length)
        hidden = self.decoder(hidden, positions, visible, mask, cache.states)
        cache.length += hidden.size(1)
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        head = self.get_output_embeddings() or self.get_input_embeddings()
        logits = F.linear(hidden, head.weight)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
        kept = cache if keep else None
        if return_dict is False:
            return tuple(part for part in (loss, logits, kept) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)

    def _masks(
        self, attention_mask: Tensor | None, hidden: Tensor, past: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return positions ``[b, s]``; which keys a query sees, ``[b, 1, s, past + s]``, None where
        plain causal will do; and 0 at padding, ``[b, s, 1]``, None where there is none."""
        length = hidden.size(1)
        places = torch.arange(past + length, device=hidden.device)
        if attention_mask is None or bool((attention_mask != 0).all()):
            positions = places[past:].expand(hidden.size(0), -1)
            if not past or length == 1:
                return positions, None, None
            return positions, (places[past:, None] >= places[None])[None, None], None
        real = attention_mask.to(hidden.device) != 0
        if set(self.config.pattern) & {"M", "R"} and bool((real[:, 1:] < real[:, :-1]).any()):
            raise ValueError("Padding must stand on the left: layers M and R read tokens in order.")
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]
        causal = places[past:, None] >= places[None]
        own = places[past:, None] == places[None]  # a padded query sees itself, not nothing
        visible = (causal & real[:, None, :]) | own
        return positions, visible[:, None], real[:, past:, None].to(hidden.dtype)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: HybridCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **_: Any,
    ) -> dict[str, Any]:
        """Return what the next call of ``forward`` takes: the tokens that the cache lacks."""
        past = past_key_values.length if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }
