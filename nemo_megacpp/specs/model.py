"""The model: Megatron's ``MambaModel`` around our stack."""

from __future__ import annotations

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.mamba import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import padded_vocab_size
from nemo_megacpp.specs.stack import build_hybrid_stack_spec


def build_hybrid_model(
    config: HybridConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    backend: BackendSpecProvider | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> MambaModel:
    """Build this rank's chunk of the model that ``config`` describes.

    Process groups must be initialised (``parallel_state``), or given.

    Args:
        config: the model.
        pre_process, post_process: whether the chunk owns the embedding, and the final norm, head
            and loss.
        vp_stage: virtual pipeline stage of the chunk.
        backend: where modules come from; this installation's default if not given.
        pg_collection: process groups; Megatron's global ones if not given.
    """
    return MambaModel(
        config,
        mamba_stack_spec=build_hybrid_stack_spec(backend, vp_stage),
        vocab_size=padded_vocab_size(
            config.vocab_size,
            config.make_vocab_size_divisible_by,
            config.tensor_model_parallel_size,
        ),
        max_sequence_length=config.seq_length,
        hybrid_override_pattern=str(config.pattern),
        position_embedding_type=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=config.parallel_output,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
        pg_collection=pg_collection,
    )
