"""A: grouped-query attention with RoPE, without an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import (
    Collective,
    Role,
    again,
    column_parallel,
    row_parallel,
    there_and_back,
)
from nemo_megacpp.formulas.saved import Saved, norm
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout.rules import Divides, GroupsDivideHeads

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes

_RULES = (
    Divides(
        "attention-heads",
        "num_attention_heads",
        "tp",
        "each rank of an A block holds whole query heads",
    ),
    # Stricter than Megatron, which for fewer groups than ranks gathers the whole QKV activation
    # over TP in each layer: the same numbers, but not a split, and one more gather boundary.
    Divides(
        "query-groups",
        "num_query_groups",
        "tp",
        "each rank of an A block holds whole KV heads, with their query heads",
    ),
    GroupsDivideHeads("attention-heads-per-group", "num_attention_heads", "num_query_groups"),
)


def attention_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return Megatron's ``TransformerLayer`` with ``SelfAttention`` only."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_layer_norm_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def _collectives(sizes: Sizes) -> list[Collective]:
    """``SelfAttention``: Q, K, V split by head; under CP, K and V of the whole sequence."""
    core = _ring(sizes) if sizes.job.kernels == "gpu" else _gathered(sizes)
    return [
        *column_parallel(sizes, "normed hidden states"),
        *core,
        *(again(core) if sizes.recomputes("core_attn") else []),
        *row_parallel(sizes, "attention output"),
    ]


def _gathered(sizes: Sizes) -> list[Collective]:
    """The torch core attention gathers keys and values over cp."""
    whole = sizes.tokens * sizes.layout.cp * sizes.kv_heads * sizes.head_dim * sizes.e
    return [
        collective
        for what in ("keys", "values")
        for collective in there_and_back(
            "all_gather", "reduce_scatter", "cp", whole, "layout transition", what
        )
    ]


def _ring(sizes: Sizes) -> list[Collective]:
    """Transformer Engine passes keys and values around a ring (``cp_comm_type='p2p'``)."""
    steps = sizes.layout.cp - 1
    part = 2 * sizes.tokens * sizes.kv_heads * sizes.head_dim * sizes.e
    if not steps:
        return []
    role: Role = "layout transition"
    what = "keys and values"
    return [
        Collective("send", "cp", part, "forward", role, what, steps, 1),
        Collective("send", "cp", part, "backward", role, what, steps, 1),
        Collective("send", "cp", part, "backward", role, f"gradient of {what}", steps + 1, 1),
    ]


def _saved_activations(sizes: Sizes) -> list[Saved]:
    from nemo_megacpp.mixers.core_attention import NARROWEST_HEAD

    tokens, e, d = sizes.tokens, sizes.e, sizes.head_dim
    heads, groups, cp = sizes.query_heads, sizes.kv_heads, sizes.layout.cp
    kept = norm(sizes)
    if sizes.config.position_embedding_type == "rope":
        turned = int(d * sizes.config.rotary_percent)
        kept.append(Saved("sines and cosines for q and k", 4 * sizes.length * turned * e))
    if sizes.job.kernels == "torch" and d < NARROWEST_HEAD and not sizes.recomputes("core_attn"):
        return kept + _padded_heads(sizes)
    kept.append(Saved("q", tokens * heads * d * e))
    gathers = cp > 1 and sizes.job.kernels == "torch"
    if gathers:
        whole = tokens * cp * groups * d * e
        kept += [Saved("k of the whole sequence", whole), Saved("v of the whole sequence", whole)]
    else:
        kept.append(Saved("k", tokens * groups * d * e))
        kept.append(Saved("q, k, v as projected", tokens * (heads + 2 * groups) * d * e))
    if not sizes.recomputes("core_attn"):
        kept.append(Saved("log-sum-exp", tokens * heads * 4))
        if gathers:
            kept.append(Saved("mask", sizes.length * sizes.config.seq_length * e))
    elif gathers:  # the inputs of the recomputed core are saved too: q, and k and v as shards
        kept = kept[:-2]
        kept.append(Saved("q, k, v as projected", tokens * (heads + 2 * groups) * d * e))
        kept.append(Saved("k", tokens * groups * d * e))
    kept.append(Saved("attention output", tokens * heads * d * e))
    return kept


def _padded_heads(sizes: Sizes) -> list[Saved]:
    """What the torch core attention saves of heads that it pads with zeros: copies."""
    from nemo_megacpp.mixers.core_attention import NARROWEST_HEAD

    tokens, heads, cp = sizes.tokens, sizes.query_heads, sizes.layout.cp
    channel = tokens * sizes.e
    kept = [
        Saved("q, padded", channel * heads * NARROWEST_HEAD),
        Saved("k and v, padded", 2 * channel * cp * sizes.kv_heads * NARROWEST_HEAD),
        Saved("log-sum-exp", tokens * heads * 4),
        Saved("attention output, padded", channel * heads * NARROWEST_HEAD),
        Saved("attention output", channel * heads * sizes.head_dim),
    ]
    if cp > 1:
        kept.append(Saved("mask", sizes.length * sizes.config.seq_length * sizes.e))
    return kept


def _mixing(sizes: Sizes) -> int:
    """Scores and weighted values over half of the sequence, as the mask is causal."""
    return 4 * sizes.query_heads * sizes.head_dim * sizes.length // 2


register(
    BlockFamily(
        letter="A",
        name="attention",
        layer_spec=attention_layer_spec,
        rules=_RULES,
        required=("num_attention_heads",),
        collectives=_collectives,
        saved_activations=_saved_activations,
        mixing=_mixing,
    )
)
