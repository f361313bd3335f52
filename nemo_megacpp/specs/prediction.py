"""The layers of one depth of multi-token prediction."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.specs.layer_stack import HybridStackSubmodules, LayerStack


class PredictionStack(LayerStack):
    """The layers of a prediction depth, in the place of the stack that Megatron's
    ``MultiTokenPredictionLayer`` builds: on one rank of the pipeline, without a final norm, which
    the depth has itself."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layers on ``[s, b, h]``, inside the random state that the depth has forked."""
        assert inference_context is None, "the hybrid stack trains"
        others = (attention_mask, rotary_pos_emb, padding_mask, packed_seq_params)
        return self.run_layers(hidden_states, *others, {}, {})[0]


def build_prediction_stack(
    config: TransformerConfig,
    submodules: HybridStackSubmodules,
    symbols: str,
    depth: int,
    pg_collection: ProcessGroupCollection,
    pattern: str | None = None,
) -> PredictionStack:
    """Build the layers of a depth (:class:`nemo_megacpp.core.multi_token.PredictionLayer`).

    Args:
        config: the model configuration.
        submodules: layer specs by family.
        symbols: the layers that Megatron's model read from its own pattern.
        depth: from 1.
        pg_collection: process groups.
        pattern: the pattern that the spec carries; it goes before ``symbols``.

    Raises:
        UserError: the model's pattern says something else than the spec's.
    """
    if pattern is None:
        return _build(config, submodules, symbols, depth, pg_collection)
    families = HybridPattern.parse(pattern).mtp_families
    alone = HybridPattern(families) if families else None
    wanted = alone and alone.to_megatron("hybrid_layer_pattern", stand_ins=True)
    if alone is None or wanted != symbols:
        raise UserError(
            f"The model's layer pattern has {symbols!r} in a prediction depth, and the stack's has "
            f"{alone.letters if alone else 'no depths'}: give both the same."
        )
    return _build(config, submodules, alone.letters, depth, pg_collection)


def _build(
    config: TransformerConfig,
    submodules: HybridStackSubmodules,
    letters: str,
    depth: int,
    pg_collection: ProcessGroupCollection,
) -> PredictionStack:
    families = HybridPattern.parse(letters).families
    return PredictionStack(
        config, submodules, families, range(len(families)), pg_collection, depth=depth
    )
