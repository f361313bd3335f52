"""A: grouped-query attention with RoPE, without an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import (
    Collective,
    Phase,
    Role,
    again,
    column_parallel,
    exchange,
    row_parallel,
    there_and_back,
)
from nemo_megacpp.formulas.inference import KeptState
from nemo_megacpp.formulas.saved import Saved, norm
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout.rules import Divides, GroupsDivideHeads, LayoutCheck, LayoutViolation

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes


def _heads_exchanged(check: LayoutCheck) -> Iterator[LayoutViolation]:
    # Transformer Engine asserts it in the first forward pass.
    shape, tp, cp = check.shape, check.layout.tp, check.layout.cp
    groups = shape.num_query_groups or shape.num_attention_heads
    if shape.cp_comm_type == "a2a" and groups and groups % (tp * cp):
        text = (
            f"num_query_groups = {groups} is not divisible by TP x CP = {tp} x {cp} = {tp * cp}: "
            f"with cp_comm_type='a2a' an A block shards its KV heads over TP and CP."
        )
        legal = ("cp_comm_type=p2p", "cp_comm_type=all_gather")
        yield LayoutViolation("CP", "query-groups-cp", text, legal=legal, knobs=("cp", "tp"))


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
    _heads_exchanged,
)


def attention_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return Megatron's ``TransformerLayer`` with ``SelfAttention`` only, as an
    :class:`AttentionLayer`."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from nemo_megacpp.mixers.self_attention import SlotSelfAttention
    from nemo_megacpp.mixers.transformer_layers import AttentionLayer

    return ModuleSpec(
        module=AttentionLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SlotSelfAttention,
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
    """``SelfAttention``: Q, K, V split by head; under CP, queries meet all keys and values."""
    core = {"p2p": _ring, "all_gather": _gathered, "a2a": _exchanged}[sizes.cp_comm_type](sizes)
    return [
        *column_parallel(sizes, "normed hidden states"),
        *core,
        *(again(core) if sizes.recomputes("core_attn") else []),
        *row_parallel(sizes, "attention output"),
    ]


def _gathered(sizes: Sizes) -> list[Collective]:
    """Keys and values are gathered over cp."""
    whole = sizes.tokens * sizes.layout.cp * sizes.kv_heads * sizes.head_dim * sizes.e
    role: Role = "layout transition"
    made = []
    for what in ("keys", "values"):
        made += there_and_back("all_gather", "reduce_scatter", "cp", whole, role, what)
        if sizes.job.kernels == "gpu":  # Transformer Engine saves this rank's part alone
            made.append(Collective("all_gather", "cp", whole, "backward", role, what))
    return made


def _exchanged(sizes: Sizes) -> list[Collective]:
    """Tokens are exchanged for heads, and back."""
    heads, groups, d = sizes.query_heads, sizes.kv_heads, sizes.head_dim
    channels = (
        *(("queries", heads), ("keys", groups), ("values", groups)),
        ("attention of these heads", heads),
    )
    return [made for what, width in channels for made in exchange(sizes, width * d, what)]


def _ring(sizes: Sizes) -> list[Collective]:
    """Keys and values travel around a ring; the gradient of a block makes one step more, to its
    owner."""
    steps = sizes.layout.cp - 1
    part = 2 * sizes.tokens * sizes.kv_heads * sizes.head_dim * sizes.e
    if not steps:
        return []
    return [
        *_passed_on("forward", part, "keys and values", steps),
        *_passed_on("backward", part, "keys and values", steps),
        *_passed_on("backward", part, "gradient of keys and values", steps + 1),
    ]


def _passed_on(phase: Phase, size: int, what: str, count: int) -> list[Collective]:
    """To the next rank, and from the one before."""
    role: Role = "layout transition"
    return [
        Collective("send", "cp", size, phase, role, what, count, 1),
        Collective("receive", "cp", size, phase, role, what, count, -1),
    ]


def _saved_activations(sizes: Sizes) -> list[Saved]:
    tokens, e, d = sizes.tokens, sizes.e, sizes.head_dim
    heads, groups = sizes.query_heads, sizes.kv_heads
    kept = norm(sizes)
    if sizes.config.position_embedding_type == "rope":
        turned = int(d * sizes.config.rotary_percent)
        kept.append(Saved("sines and cosines for q and k", 4 * sizes.length * turned * e))
    if sizes.recomputes("core_attn"):
        # What goes into the core, whatever it makes of it.
        kept.append(Saved("q", tokens * heads * d * e))
        kept.append(Saved("k", tokens * groups * d * e))
        kept.append(Saved("q, k, v as projected", tokens * (heads + 2 * groups) * d * e))
    else:
        kept += _saved_by_core(sizes)
        kept.append(Saved("log-sum-exp", tokens * heads * 4))
    kept.append(Saved("attention output", tokens * heads * d * e))
    return kept


def _saved_by_core(sizes: Sizes) -> list[Saved]:
    """What the core attention saves, but for its log-sum-exp and what it returns."""
    from nemo_megacpp.mixers.core_attention import NARROWEST_HEAD

    heads, groups, cp, d = sizes.query_heads, sizes.kv_heads, sizes.layout.cp, sizes.head_dim
    channel = sizes.tokens * sizes.e
    in_torch = sizes.job.kernels == "torch"
    form = sizes.cp_comm_type if cp > 1 and in_torch else None
    q = Saved("q", channel * heads * d)
    if form == "p2p":
        return [q, Saved("k and v of this rank", 2 * channel * groups * d)]
    gathers = form == "all_gather"
    whole = channel * groups * (cp if gathers else 1)
    mask = [Saved("mask", sizes.length * sizes.config.seq_length * sizes.e)] if gathers else []
    if in_torch and d < NARROWEST_HEAD:
        return [
            Saved("q, padded", channel * heads * NARROWEST_HEAD),
            Saved("k and v, padded", 2 * whole * NARROWEST_HEAD),
            Saved("attention output, padded", channel * heads * NARROWEST_HEAD),
            *mask,
        ]
    if gathers:
        return [
            q,
            Saved("k of the whole sequence", whole * d),
            Saved("v of the whole sequence", whole * d),
            *mask,
        ]
    if form == "a2a":
        return [
            Saved("q of some heads", channel * heads * d),
            Saved("k and v of some heads", 2 * channel * groups * d),
            Saved("attention output of some heads", channel * heads * d),
        ]
    return [
        q,
        Saved("k", channel * groups * d),
        Saved("q, k, v as projected", channel * (heads + 2 * groups) * d),
    ]


def _mixing(sizes: Sizes) -> int:
    """Scores and weighted values over half of the sequence, as the mask is causal."""
    return 4 * sizes.query_heads * sizes.head_dim * sizes.length // 2


def _inference_state(sizes: Sizes) -> list[KeptState]:
    head = sizes.kv_heads * sizes.head_dim * sizes.e
    return [KeptState("keys", head, per_token=True), KeptState("values", head, per_token=True)]


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
        inference_state=_inference_state,
    )
)
