"""A hybrid language model that ``nemo-megacpp checkpoint export --to hf`` has written.

Modules and parameters have the names of the checkpoint, so that the export changes no tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers copies the files that this one imports, and not those that they import.
from .attention_nemo_megacpp import Attention
from .configuration_nemo_megacpp import NemoMegacppConfig
from .experts_nemo_megacpp import DenseMLP, MixtureOfExperts
from .m2rnn_nemo_megacpp import M2RNN
from .mamba_nemo_megacpp import Mamba2, Mamba3
from .parts_nemo_megacpp import Scale, State

# Parts of the names of parameters that stay float32 in a model of bfloat16 or float16.
FLOAT32 = {
    *("A_log", "dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"),
    "expert_bias",
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
