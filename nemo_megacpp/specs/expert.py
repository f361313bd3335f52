"""E: a mixture of experts with a shared expert, and an expert-tensor-parallel degree of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import (
    Collective,
    again,
    column_parallel,
    row_parallel,
    there_and_back,
)
from nemo_megacpp.formulas.inference import no_state
from nemo_megacpp.formulas.saved import Saved, inside_mlp, norm
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout.rules import Divides

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes

_RULES = (
    Divides(
        "experts",
        "num_moe_experts",
        "ep",
        "each rank of an E block holds the same number of experts",
    ),
    Divides(
        "expert-ffn",
        "moe_ffn_hidden_size",
        "etp",
        "each expert's matrices are split along their FFN dimension",
    ),
    Divides(
        "shared-expert-ffn",
        "moe_shared_expert_intermediate_size",
        "tp",
        "the shared expert is a dense MLP, split over TP",
    ),
)


def expert_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return Megatron's ``TransformerLayer`` with ``MoELayer`` only.

    Router, experts and shared expert are Megatron's, as :mod:`nemo_megacpp.mixers.experts` corrects
    them.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    from nemo_megacpp.core.moe import moe_spec
    from nemo_megacpp.mixers.experts import CapacityRouter, SharedExpert

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.layer_norm(rms_norm=True),
            mlp=moe_spec(backend, CapacityRouter, SharedExpert),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _collectives(sizes: Sizes) -> list[Collective]:
    """``MoELayer``: routing, dispatch, combine, and the shared expert beside them."""
    shared = []
    if sizes.shared_expert_width:
        shared = column_parallel(sizes, "shared expert's input")
        shared += row_parallel(sizes, "shared expert's output")
    dispatch = {"alltoall": _all_to_all_dispatch, "allgather": _all_gather_dispatch}[
        sizes.config.moe_token_dispatcher_type
    ]
    made = [*shared, *_capacity(sizes), *dispatch(sizes)]
    if sizes.recomputes("moe"):
        made += again(made)
    elif sizes.recomputes("shared_experts"):
        made += again(shared)
    return made + _auxiliary_losses(sizes)


def _auxiliary_losses(sizes: Sizes) -> list[Collective]:
    """The counts that balancing losses need, of the tokens that the ranks of a group hold. In the
    pass that builds no graph, Megatron skips these losses."""
    from nemo_megacpp.mixers.aux_loss import balancing_kinds

    return [
        Collective(
            *("all_reduce", "tp-cp", rows * sizes.experts * 8, "forward", "routing", what),
            once=True,
        )
        for kind in balancing_kinds(sizes.config)
        for what, rows in [("tokens per expert", sizes.batch if kind == "seq_aux_loss" else 1)]
    ]


def _capacity(sizes: Sizes) -> list[Collective]:
    """The probabilities of a whole microbatch, from which a capacity drops the least."""
    if sizes.config.moe_expert_capacity_factor is None:
        return []
    size = sizes.tokens * sizes.layout.cp * sizes.experts * sizes.router_bytes
    return [
        Collective("all_gather", "tp-cp", size, "forward", "routing", "probabilities, for capacity")
    ]


def _all_to_all_dispatch(sizes: Sizes) -> list[Collective]:
    """``MoEAlltoAllTokenDispatcher``: token copies to the ranks of their experts and back."""
    rows, layout = sizes.shared_tokens * sizes.topk, sizes.layout
    metadata = sizes.experts * 8 * layout.etp * layout.ep
    tokens, probabilities = rows * sizes.h * sizes.e, rows * sizes.router_bytes
    made = [Collective("all_gather", "etp-ep", metadata, "forward", "routing", "tokens per expert")]
    for what, size in (("token copies", tokens), ("probabilities", probabilities)):
        made += there_and_back("all_to_all", "all_to_all", "ep", size, "dispatch", what)
        made += there_and_back(
            "all_gather", "reduce_scatter", "etp", size * layout.etp, "gather boundary", what
        )
    made += there_and_back(
        "reduce_scatter", "all_gather", "etp", tokens * layout.etp, "sum", "expert outputs"
    )
    made += there_and_back("all_to_all", "all_to_all", "ep", tokens, "dispatch", "expert outputs")
    return made


def _all_gather_dispatch(sizes: Sizes) -> list[Collective]:
    """``MoEAllGatherTokenDispatcher``: every rank sees every token and keeps its experts'."""
    rows = sizes.shared_tokens * sizes.layout.etp * sizes.layout.ep
    chosen = rows * sizes.experts
    tokens, outputs = rows * sizes.h * sizes.e, rows * sizes.h * sizes.router_bytes
    gather = partial(there_and_back, "all_gather", "reduce_scatter", "etp-ep")
    probabilities = chosen * sizes.router_bytes
    return [
        Collective("all_gather", "etp-ep", chosen, "forward", "routing", "routing map"),
        *gather(probabilities, "routing", "probabilities"),
        *gather(tokens, "dispatch", "tokens"),
        *there_and_back(
            "reduce_scatter", "all_gather", "etp-ep", outputs, "dispatch", "expert outputs"
        ),
    ]


def _saved_activations(sizes: Sizes) -> list[Saved]:
    kept = norm(sizes)
    if sizes.recomputes("layernorm"):
        kept.pop()  # the output
    if sizes.recomputes("moe"):
        return kept
    if not sizes.recomputes("shared_experts"):
        width = sizes.tokens * sizes.shared_expert_width * sizes.e
        kept.append(Saved("shared expert: between its matrices", inside_mlp(sizes) * width))
    return [*kept, *_routing(sizes), *_routed(sizes)]


def _routing(sizes: Sizes) -> list[Saved]:
    tokens, experts, k, p = sizes.shared_tokens, sizes.experts, sizes.topk, sizes.router_bytes
    kinds = sizes.config.moe_router_load_balancing_type
    balances = sizes.config.moe_aux_loss_coeff and kinds != "none"
    choice = tokens * (experts * p + k * 8 + p)
    kept = [
        Saved("router: scores, choice and its sum", choice),
        Saved("router: chosen scores", tokens * k * p),
        Saved("router: map and probabilities", tokens * experts * (1 + p)),
        Saved("router: order of the token copies", tokens * k * 8),
    ]
    if balances:
        kept.append(Saved("balancing loss: scores and choice", choice))
        kept.append(Saved("balancing loss: tokens per expert", experts * sizes.batch * 8 + 4))
    return kept


def _routed(sizes: Sizes) -> list[Saved]:
    rows, e = sizes.expert_rows, sizes.e
    width = rows * (sizes.config.moe_ffn_hidden_size or 0) // sizes.layout.etp * e
    inside = inside_mlp(sizes) + (1 if sizes.job.kernels == "torch" else 0)
    inside -= sizes.recomputes("moe_act")  # the product, which the second matrix takes
    return [
        Saved("experts: token copies", rows * sizes.h * e),
        Saved("experts: probabilities", rows * sizes.router_bytes),
        Saved("experts: between their matrices", inside * width),
    ]


register(
    BlockFamily(
        letter="E",
        name="experts",
        layer_spec=expert_layer_spec,
        rules=_RULES,
        required=("num_moe_experts", "moe_ffn_hidden_size"),
        collectives=_collectives,
        saved_activations=_saved_activations,
        inference_state=no_state,
    )
)
