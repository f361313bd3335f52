"""What multi-token prediction needs, and what it does not go with, as messages."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer import TransformerConfig

from nemo_megacpp.core.multi_token import missing_prediction
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.pattern import MTP, Family, HybridPattern


def prediction_violations(
    config: TransformerConfig, pattern: HybridPattern, hybrid: HybridFields
) -> Iterator[str]:
    """Yield why the prediction depths of a pattern cannot be trained as the model is set.

    Args:
        config: of the model.
        pattern: its layers.
        hybrid: its hybrid fields.
    """
    depths = pattern.mtp_num_depths
    if config.mtp_num_layers not in (None, depths or None):
        yield (
            f"mtp_num_layers={config.mtp_num_layers}, and the pattern {pattern} has {depths} "
            f"prediction depths. The pattern says how many there are and of which layers, as in "
            f"'AEMR{MTP}AM{MTP}AM'; leave mtp_num_layers out."
        )
    if not depths:
        return
    if reason := missing_prediction():
        yield (
            f"The pattern {pattern} has layers for multi-token prediction, after {MTP!r}: {reason}."
            f" Leave them out, or install Megatron-Core 0.19 (docs/versions.md)."
        )
    scale = config.mtp_loss_scaling_factor
    if scale is None or not scale >= 0:
        yield f"mtp_loss_scaling_factor: {scale} must be at least 0."
    if config.recompute_granularity == "full":
        yield (
            "recompute_granularity='full' with multi-token prediction: Megatron recomputes a depth "
            "with 'uniform' one layer at a time and not at all with 'block', and its layers would "
            "be recomputed twice. Use 'selective'."
        )
    if config.fp8:
        yield (
            f"fp8={config.fp8!r} with multi-token prediction: no GPU has proved a depth in fp8. "
            f"Leave fp8 unset."
        )
    if getattr(hybrid, "side_channels", None):
        yield (
            "side_channels with multi-token prediction: a depth embeds tokens ahead of its own, "
            "and knows the ids of side channels of neither. Leave one of them out."
        )
    if hybrid.m2rnn_depth_state and Family.RECURRENT in pattern.mtp_families:
        yield (
            "m2rnn_depth_state=True with R blocks in a prediction depth: nothing hands the state "
            "of the decoder's last R block to them. Leave R out of the depths, or the state off."
        )
    if hybrid.share_embeddings_and_output_weights:
        yield (
            "share_embeddings_and_output_weights=True with multi-token prediction: on more than "
            "one stage, Megatron's HybridModel allocates a second head that nothing trains, and "
            "fails to save it. Leave it at False."
        )
