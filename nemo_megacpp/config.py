"""The model configuration: Megatron's ``TransformerConfig`` plus the hybrid fields."""

# NeMo-Run reads a command-line value by its field's annotation at run time, and knows
# Optional[int], but neither "int | None" nor postponed annotations.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from nemo_megacpp.dimensions import M2RNNDimensions, Mamba3Dimensions
from nemo_megacpp.errors import UserError, collect_violations, raise_violations
from nemo_megacpp.families import load_families
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.settings.check import setting_violations
from nemo_megacpp.settings.combinations import (
    bias_violations,
    ignored_violations,
    range_violations,
    recompute_violations,
)
from nemo_megacpp.values import choices

NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass
class HybridConfig(HybridFields, TransformerConfig):
    """``TransformerConfig`` of a hybrid A/M/E/R model.

    ``num_layers`` is the depth to which ``hybrid_pattern`` is tiled; left at 0 it is the pattern's
    own length. The ``m2rnn_*`` and ``mamba3_*`` fields are those of :class:`M2RNNDimensions` and
    :class:`Mamba3Dimensions`; other fields without a comment are Megatron's, with its meaning.

    Raises:
        UserError: for a pattern that cannot be read, or a field that no backend supports.
    """

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    add_bias_linear: bool = False
    gated_linear_unit: bool = True
    activation_func: Callable = F.silu
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    bias_dropout_fusion: bool = False
    masked_softmax_fusion: bool = False
    gradient_accumulation_fusion: bool = False
    persist_layer_norm: bool = False
    apply_rope_fusion: bool = False
    is_hybrid_model: bool = True

    def __post_init__(self) -> None:
        self.finalize()
        super().__post_init__()

    def finalize(self) -> None:
        """Validate the hybrid fields, and derive what follows from them."""
        load_families(self.family_modules)
        depth: int = self.num_layers
        pattern = HybridPattern.parse(self.hybrid_pattern, depth=depth or None)
        self.num_layers: int = len(pattern)
        raise_violations(self._violations(pattern))
        if (
            self.virtual_pipeline_model_parallel_size is not None
            and self.pipeline_model_parallel_size == 2
        ):
            # Two stages are each other's next and previous one. Megatron matches a batch of sends
            # and receives by order, and a stage would receive the wrong tensor without an error;
            # sent one by one, they use two groups.
            self.overlap_p2p_comm = True
            self.batch_p2p_comm = False
        if Family.EXPERT not in pattern.families:
            # Megatron refuses sizes of experts in a model without experts.
            self.num_moe_experts = None
            self.moe_ffn_hidden_size = None
            self.moe_shared_expert_intermediate_size = None
            self.moe_router_num_groups = None
            self.moe_router_group_topk = None
        if self.m2rnn_num_heads is None:
            self.m2rnn_num_heads = _heads_that_fill(self.hidden_size, self.m2rnn_value_head_dim)

    def _violations(self, pattern: HybridPattern) -> Iterator[str]:
        """Yield everything that cannot be built or would not be read as it is meant."""
        yield from config_violations(self, pattern)
        yield from self._field_violations()
        families = pattern.families
        messages: list[str] = []
        with collect_violations(messages):
            if Family.MAMBA in families and self.mode == "mamba3":
                mamba3_dimensions(self)
        with collect_violations(messages):
            if Family.RECURRENT in families:
                m2rnn_dimensions(self)
        yield from messages
        rotates = self.position_embedding_type == "rope" and 0 < self.rotary_percent <= 1
        if Family.ATTENTION in families and rotates:
            head_dim = self.kv_channels or self.hidden_size // self.num_attention_heads
            if (turned := int(head_dim * self.rotary_percent)) % 2 or not turned:
                yield (
                    f"rotary_percent={self.rotary_percent} turns {turned} of kv_channels={head_dim}"
                    f" channels: it must be an even number, and at least 2."
                )
        if Family.EXPERT in families and not self.num_moe_experts:
            yield (
                f"The pattern {pattern} has E blocks, and num_moe_experts is "
                f"{self.num_moe_experts}."
            )

    def _field_violations(self) -> Iterator[str]:
        """Yield values of the hybrid fields that are illegal or that nothing would read."""
        for field in fields(HybridConfig):
            value, legal = getattr(self, field.name), choices(field.type)
            if legal and value not in legal and value != field.default:
                yield f"{field.name}={value!r}: the choices are {', '.join(legal)}."
            elif (
                self.mode != "mamba3"
                and field.name.startswith("mamba3_")
                and value != field.default
            ):
                yield (
                    f"{field.name}={value!r} is a setting of mode='mamba3'; here mode="
                    f"{self.mode!r}, whose M blocks are Megatron's own. Set the mode, or leave it "
                    f"out."
                )
        if not 0 < self.rotary_percent <= 1:
            yield f"rotary_percent: {self.rotary_percent} must be above 0, at most 1."
        if self.make_vocab_size_divisible_by < 0:
            yield (
                f"make_vocab_size_divisible_by: {self.make_vocab_size_divisible_by} must be at "
                f"least 0, which turns padding off."
            )
        if not self.parallel_output and self.tensor_model_parallel_size > 1:
            # The loss takes each rank's logits for its share of the vocabulary.
            yield (
                f"parallel_output=False gathers the logits over TP="
                f"{self.tensor_model_parallel_size}, and the loss would count them as many times. "
                f"Leave it at True."
            )

    @property
    def pattern(self) -> HybridPattern:
        """The parsed pattern, one family per layer."""
        return HybridPattern.parse(self.hybrid_pattern, depth=self.num_layers)

    @property
    def num_expert_blocks(self) -> int:
        """E blocks in the whole model: what an auxiliary loss is averaged over."""
        return self.pattern.counts()[Family.EXPERT]


def config_violations(
    config: TransformerConfig, pattern: HybridPattern, settings: Mapping[str, Any] = NO_SETTINGS
) -> Iterator[str]:
    """Yield what the hybrid stack cannot compute as it is set.

    Args:
        config: a :class:`HybridConfig`, or the plain one that Megatron's own scripts build.
        pattern: its layers.
        settings: with a plain configuration, the ``m2rnn_*`` and ``mamba3_*`` fields that are not
            at their defaults.
    """
    yield from setting_violations(TransformerConfig, vars(config))
    yield from range_violations(config)
    yield from ignored_violations(config)
    present = dict.fromkeys(pattern.families)
    yield from recompute_violations(config, [family.value for family in present])
    unbiased = [family.value for family in present if _unbiased(config, family)]
    yield from bias_violations(config, unbiased)
    clip = _mixer_settings(config, settings, "m2rnn_")["state_gradient_clip"]
    if Family.RECURRENT in present and clip is not None and config.calculate_per_token_loss:
        yield (
            "calculate_per_token_loss=True scales gradients during the backward pass, where the R "
            "block bounds them. Turn it off, or set m2rnn_state_gradient_clip to null."
        )


def _unbiased(config: TransformerConfig, family: Family) -> bool:
    mamba3 = isinstance(config, HybridConfig) and config.mode == "mamba3"
    return family is Family.RECURRENT or (family is Family.MAMBA and mamba3)


def _heads_that_fill(hidden_size: int, value_head_dim: int) -> int:
    if hidden_size % value_head_dim:
        raise UserError(
            f"hidden_size={hidden_size} is not a multiple of the R block's value head dim "
            f"{value_head_dim}, so its number of heads must be given (m2rnn_num_heads)."
        )
    return hidden_size // value_head_dim


def _mixer_settings(
    config: TransformerConfig, settings: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """Return the hybrid fields of a mixer without their prefix: those of ``config``, or for a plain
    configuration what ``settings`` give, else the defaults."""
    assert not (settings and isinstance(config, HybridConfig)), "it carries these fields itself"
    return {
        field.name.removeprefix(prefix): getattr(config, field.name)
        if isinstance(config, HybridConfig)
        else settings.get(field.name, field.default)
        for field in fields(HybridFields)
        if field.name.startswith(prefix)
    }


def config_fields(
    model: Mapping[str, Any], layout: ParallelLayout, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Return the fields of the :class:`HybridConfig` of a model in a layout.

    Every configuration of the package is built from these: the one that is validated, planned,
    proved, resharded and trained.

    Args:
        model: fields without the layout's.
        layout: the parallel degrees.
        dtype: of parameters and activations.
        device: ``"cuda"`` or ``"cpu"``, which decides where weights are initialised.
    """
    return {
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
        **model,
        **layout.megatron_fields(),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": device == "cpu",
    }


def m2rnn_dimensions(
    config: TransformerConfig, settings: Mapping[str, Any] = NO_SETTINGS
) -> M2RNNDimensions:
    """Return the R mixer's sizes.

    Args:
        config: a :class:`HybridConfig`, or the plain configuration that Megatron's own scripts
            build.
        settings: with a plain one, the ``m2rnn_*`` fields that are not at their defaults.

    Raises:
        UserError: a size or setting is illegal.
    """
    found = _mixer_settings(config, settings, "m2rnn_")
    found["num_heads"] = found["num_heads"] or _heads_that_fill(
        config.hidden_size, found["value_head_dim"]
    )
    return M2RNNDimensions(**found)


def mamba3_dimensions(
    config: TransformerConfig, settings: Mapping[str, Any] = NO_SETTINGS
) -> Mamba3Dimensions:
    """Return the sizes of a Mamba-3 mixer: Megatron's ``mamba_*`` fields and the ``mamba3_*`` ones.

    Without ``mamba_num_heads`` the heads are twice the hidden size wide, as in Megatron's
    ``MambaMixer``.

    Args:
        config: as for :func:`m2rnn_dimensions`.
        settings: with a plain one, the ``mamba3_*`` fields that are not at their defaults.

    Raises:
        UserError: a size or setting is illegal.
    """
    found = _mixer_settings(config, settings, "mamba3_")
    found["pairs"] = found["pairs"] or ("interleaved" if found["mimo_rank"] == 1 else "halves")
    heads = config.mamba_num_heads
    if heads is None:
        heads = 2 * config.hidden_size // config.mamba_head_dim
    sizes = (heads, config.mamba_head_dim, config.mamba_state_dim, config.mamba_num_groups)
    return Mamba3Dimensions(*sizes, **found)
