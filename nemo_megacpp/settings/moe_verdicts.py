"""Verdicts on what ``TransformerConfig`` says of E blocks."""

from __future__ import annotations

from nemo_megacpp.settings.verdict import Setting, Table, neutral, only_with, proved, refused

_SIZE = "A size: part of the model's identity, the same in all layouts, and checked against them"
_BY_RANK = "Whether a token is dropped would depend on which rank holds it"
_FLEX = "moe_token_dispatcher_type='flex'"


def _covered(reason: str, field: str) -> Setting:
    return proved(reason, f"covering:TransformerConfig.{field}")


_ROUTES = "A function of one token's scores"

EXPERTS: Table = {
    # Sizes and kinds of experts.
    "num_moe_experts": neutral(_SIZE),
    "moe_ffn_hidden_size": neutral(_SIZE),
    "moe_shared_expert_intermediate_size": neutral(_SIZE),
    "moe_shared_expert_gate": _covered(
        "A gate that all ranks of a tensor-parallel group hold", "moe_shared_expert_gate"
    ),
    "moe_shared_expert_overlap": _covered(
        "When the shared expert computes", "moe_shared_expert_overlap"
    ),
    "moe_latent_size": refused(
        "Each rank of a tensor-parallel group holds its projections whole, and no case has them"
    ),
    "moe_grouped_gemm": neutral("The experts are the backend's, grouped with Transformer Engine"),
    "moe_use_legacy_grouped_gemm": refused("The experts are the backend's"),
    "moe_apply_probs_on_input": neutral("Where one token is multiplied by its one probability"),
    # Routing.
    "moe_router_topk": neutral(_ROUTES),
    "moe_router_num_groups": _covered(_ROUTES, "moe_router_num_groups"),
    "moe_router_group_topk": _covered(_ROUTES, "moe_router_group_topk"),
    "moe_router_pre_softmax": _covered(_ROUTES, "moe_router_pre_softmax"),
    "moe_router_topk_scaling_factor": _covered(_ROUTES, "moe_router_topk_scaling_factor"),
    "moe_router_score_function": _covered(_ROUTES, "moe_router_score_function"),
    "moe_router_dtype": neutral(
        "The type of one token's scores: rounding, alike in all layouts; recipes set 'fp32'"
    ),
    "moe_router_topk_limited_devices": refused(
        "It makes as many groups of experts as EP, so that EP would decide the routing; "
        "moe_router_num_groups and moe_router_group_topk are its successors"
    ),
    "moe_router_force_load_balancing": refused("Every rank would route at random"),
    "moe_enable_routing_replay": refused("Nothing in a training loop records or replays routes"),
    "moe_input_jitter_eps": refused(
        "Each rank draws its noise by itself, with SP the same for different tokens"
    ),
    # Balance.
    "moe_router_load_balancing_type": proved(
        "What the balancing loss is taken over: a microbatch, or each sequence in it",
        "covering:TransformerConfig.moe_router_load_balancing_type",
        legal=("aux_loss", "seq_aux_loss", "none"),
        otherwise="'global_aux_loss' keeps a running average over microbatches, of which a "
        "data-parallel rank sees others in another layout, and 'sinkhorn' normalises over the "
        "tokens that a rank happens to hold",
        each=True,
    ),
    "moe_aux_loss_coeff": _covered("Multiplies the balancing loss", "moe_aux_loss_coeff"),
    "moe_z_loss_coeff": _covered("Multiplies a mean over tokens", "moe_z_loss_coeff"),
    "moe_router_enable_expert_bias": _covered(
        "Moves with the tokens of the global batch", "moe_router_enable_expert_bias"
    ),
    "moe_router_bias_update_rate": neutral("Multiplies what moves the expert bias"),
    # Capacity.
    "moe_expert_capacity_factor": _covered(
        "Tokens are dropped over the whole microbatch", "moe_expert_capacity_factor"
    ),
    "moe_pad_expert_input_to_capacity": refused(_BY_RANK),
    "moe_token_drop_policy": refused(_BY_RANK),
    "moe_token_dropping": refused(
        "Megatron-Core 0.16 has no code for it; moe_expert_capacity_factor drops tokens"
    ),
    # Dispatch.
    "moe_token_dispatcher_type": proved(
        "How tokens reach their experts",
        "covering:TransformerConfig.moe_token_dispatcher_type",
        legal=("allgather", "alltoall"),
        otherwise="'flex' sends tokens by DeepEP or HybridEP, which no GPU has proved here",
    ),
    "moe_enable_deepep": refused(f"An old name of {_FLEX}, which no GPU has proved here"),
    "moe_flex_dispatcher_backend": only_with(_FLEX),
    "moe_deepep_num_sms": only_with(_FLEX),
    "moe_hybridep_num_sms": only_with(_FLEX),
    "moe_permute_fusion": neutral("Transformer Engine's kernel for the same permutation of tokens"),
    "moe_router_fusion": neutral(
        "Transformer Engine's kernels for the same scores, choices and balancing loss"
    ),
    "moe_router_padding_for_quantization": refused("It needs fp8 or fp4, which are refused"),
    "moe_router_padding_for_fp8": refused("It needs fp8, which is refused"),
    "moe_per_layer_logging": neutral("What Megatron's scripts log of each layer"),
    "moe_layer_recompute": neutral("An old name of recompute_modules=['moe'], which is proved"),
}
