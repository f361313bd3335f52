"""F: Megatron's dense MLP, the ``-`` of its hybrid patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import Collective, again, column_parallel, row_parallel
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
        "ffn",
        "ffn_hidden_size",
        "tp",
        "an F block is a dense MLP, split over TP along its FFN dimension",
    ),
)


def feed_forward_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return a ``TransformerLayer`` with Megatron's ``MLP`` only, its norm fused into the first
    matrix, as in the MLP layer of Megatron's ``mamba_stack_spec``."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from nemo_megacpp.core.layers import mlp_spec
    from nemo_megacpp.mixers.transformer_layers import FeedForwardLayer

    return ModuleSpec(
        module=FeedForwardLayer,
        submodules=TransformerLayerSubmodules(
            mlp=mlp_spec(
                MLPSubmodules(
                    linear_fc1=backend.column_parallel_layer_norm_linear(),
                    activation_func=backend.activation_func(),
                    linear_fc2=backend.row_parallel_linear(),
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _collectives(sizes: Sizes) -> list[Collective]:
    """``MLP``: into the first matrix, out of the second."""
    made = [*column_parallel(sizes, "normed hidden states"), *row_parallel(sizes, "MLP output")]
    return made + (again(made) if sizes.recomputes("mlp") else [])


def _saved_activations(sizes: Sizes) -> list[Saved]:
    if sizes.recomputes("mlp"):  # with the norm, which is inside
        return [Saved("norm: input", sizes.shared_tokens * sizes.h * sizes.e)]
    width = sizes.tokens * sizes.ffn_width * sizes.e
    return [*norm(sizes), Saved("between the matrices", inside_mlp(sizes) * width)]


register(
    BlockFamily(
        letter="F",
        name="feed-forward",
        layer_spec=feed_forward_layer_spec,
        rules=_RULES,
        required=("ffn_hidden_size",),
        collectives=_collectives,
        saved_activations=_saved_activations,
        inference_state=no_state,
    )
)
