"""The fields that a hybrid model adds to Megatron's ``TransformerConfig``. Loads no torch."""

# NeMo-Run reads a command-line value by its field's annotation at run time, and knows
# Optional[int], but neither "int | None" nor postponed annotations.
# ruff: noqa: UP045

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from nemo_megacpp.mixer_settings import (
    AActivation,
    ClipOrder,
    Kernel,
    M2RNNSettings,
    Mamba3Settings,
    Pairs,
    SequenceExchange,
)

Mode = Literal["nemo_native", "mamba3"]

LARGEST = {
    **dict.fromkeys(("hidden_size", "seq_length"), 2**24),
    "vocab_size": 2**26,
    "num_layers": 2**16,
    **dict.fromkeys(("ffn_hidden_size", "moe_ffn_hidden_size"), 2**26),
    "moe_shared_expert_intermediate_size": 2**26,
    **dict.fromkeys(("num_attention_heads", "num_query_groups", "kv_channels"), 2**20),
    **dict.fromkeys(("num_moe_experts", "moe_router_topk"), 2**13),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "mamba_state_dim"), 2**20),
    **dict.fromkeys(("mamba_num_groups", "m2rnn_num_heads"), 2**20),
    **dict.fromkeys(("m2rnn_key_head_dim", "m2rnn_value_head_dim"), 2**16),
    **dict.fromkeys(("m2rnn_conv_kernel", "mamba3_mimo_rank"), 2**10),
    "make_vocab_size_divisible_by": 2**24,
}
"""The largest sizes of a model, far beyond any that was trained: what follows counts with them."""


def size_violations(model: Mapping[str, Any]) -> Iterator[str]:
    """Yield sizes of a model that are beyond reason."""
    for name, most in LARGEST.items():
        value = model.get(name)
        if isinstance(value, int) and value > most:
            yield f"{name}: {value:,} is more than {most:,}, the largest that is accepted."


@dataclass
class HybridFields:
    """The fields of :class:`nemo_megacpp.config.HybridConfig` that are not Megatron's.

    The ``m2rnn_*`` and ``mamba3_*`` fields are those of :class:`M2RNNSettings` and
    :class:`Mamba3Settings`.
    """

    hybrid_pattern: str = ""
    """The pattern, with ``|`` for explicit pipeline cuts (:mod:`nemo_megacpp.pattern`)."""
    mode: Mode = "nemo_native"
    """Which mixer an M block gets: ``nemo_native`` is Megatron's own ``MambaMixer`` (Mamba-2),
    ``mamba3`` is ours (:mod:`nemo_megacpp.mixers.mamba3_mixer`). Both take Megatron's
    ``mamba_*`` sizes."""

    family_modules: Optional[list[str]] = None
    """Modules, or paths of Python files, that add block families (:mod:`nemo_megacpp.families`)."""

    side_channels: Optional[list[dict[str, Any]]] = None
    """Integers beside the tokens, and the layers that embed them, each with the fields of
    :class:`nemo_megacpp.side_channels.SideChannel`."""

    vocab_size: int = 0
    """Tokens of the tokenizer, before padding."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this and of the tensor-parallel size: not of their
    product, as Megatron's is, so that the rows are the same in every layout. 0: no padding."""
    seq_length: int = 4096
    """Tokens per sample, ``s``."""
    position_embedding_type: Literal["rope", "none"] = "rope"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    share_embeddings_and_output_weights: bool = False
    parallel_output: bool = True
    fp16_lm_cross_entropy: bool = False

    m2rnn_num_heads: Optional[int] = M2RNNSettings.num_heads
    m2rnn_key_head_dim: int = M2RNNSettings.key_head_dim
    m2rnn_value_head_dim: int = M2RNNSettings.value_head_dim
    m2rnn_conv_kernel: int = M2RNNSettings.conv_kernel
    m2rnn_state_gradient_clip: Optional[float] = M2RNNSettings.state_gradient_clip
    m2rnn_clip_order: ClipOrder = M2RNNSettings.clip_order
    m2rnn_context_parallel: SequenceExchange = M2RNNSettings.context_parallel
    m2rnn_kernel: Kernel = M2RNNSettings.kernel
    m2rnn_depth_state: bool = M2RNNSettings.depth_state

    mamba3_mimo_rank: int = Mamba3Settings.mimo_rank
    mamba3_rope_fraction: float = Mamba3Settings.rope_fraction
    mamba3_A_activation: AActivation = Mamba3Settings.A_activation
    mamba3_A_floor: float = Mamba3Settings.A_floor
    mamba3_pairs: Optional[Pairs] = Mamba3Settings.pairs
    mamba3_output_norm: bool = Mamba3Settings.output_norm
    mamba3_kernel: Kernel = Mamba3Settings.kernel
