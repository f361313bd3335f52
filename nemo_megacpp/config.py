"""The model configuration: Megatron's ``TransformerConfig`` plus the hybrid fields."""

# NeMo-Run reads a command-line value by its field's annotation at run time, and knows
# Optional[int], but neither "int | None" nor postponed annotations.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from nemo_megacpp.errors import collect_violations, raise_violations
from nemo_megacpp.families import load_families
from nemo_megacpp.hybrid_fields import HybridFields, size_violations
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixer_settings import M2RNNSettings, Mamba3Settings
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.settings.combinations import (
    OWN_MODULES,
    bias_violations,
    ignored_violations,
    range_violations,
    recompute_violations,
)
from nemo_megacpp.settings.multi_token import prediction_violations
from nemo_megacpp.settings.validate import setting_violations
from nemo_megacpp.side_channels import side_channel_violations
from nemo_megacpp.values import choices

ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": squared_relu,
    "quick_gelu": quick_gelu,
}
"""Activations of experts and MLPs by the name that a checkpoint's description and an export have
for them."""


@dataclass
class HybridConfig(HybridFields, TransformerConfig):
    """``TransformerConfig`` of a hybrid model.

    ``num_layers`` is the depth to which ``hybrid_pattern`` is tiled; left at 0 it is the pattern's
    own length. The ``m2rnn_*`` and ``mamba3_*`` fields are those of :class:`M2RNNSettings` and
    :class:`Mamba3Settings`; other fields without a comment are Megatron's, with its meaning.

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
        self.derive(super().__post_init__)

    def derive(self, megatron: Callable[[], None]) -> None:
        """Validate the fields, and derive what follows from them.

        Args:
            megatron: derives the rest: ``TransformerConfig.__post_init__`` of this object.
        """
        self._settle()
        modules: list[str] | None = self.recompute_modules
        if modules is not None:
            # Megatron asserts that it knows every name.
            self.recompute_modules: list[str] | None = [
                name for name in modules if name not in OWN_MODULES
            ]
        megatron()
        if modules is not None:
            filled_in = [name for name in self.recompute_modules or () if name not in modules]
            self.recompute_modules = [*modules, *filled_in]

    def _settle(self) -> None:
        """Validate the hybrid fields, and derive what follows from them."""
        load_families(self.family_modules)
        raise_violations(size_violations(vars(self)))
        depth: int = self.num_layers
        pattern = HybridPattern.parse(self.hybrid_pattern, depth=depth or None)
        self.num_layers: int = len(pattern)
        raise_violations(self._violations(pattern))
        self.mtp_num_layers: int | None = pattern.mtp_num_depths or None
        if (
            self.virtual_pipeline_model_parallel_size is not None
            and self.pipeline_model_parallel_size == 2
        ):
            # Two stages are each other's next and previous one. Megatron matches a batch of sends
            # and receives by order, and a stage would receive the wrong tensor without an error;
            # sent one by one, they use two groups.
            self.overlap_p2p_comm = True
            self.batch_p2p_comm = False
        if Family.EXPERT not in pattern.all_families:
            # Megatron refuses sizes of experts in a model without experts.
            self.num_moe_experts = None
            self.moe_ffn_hidden_size = None
            self.moe_shared_expert_intermediate_size = None
            self.moe_router_num_groups = None
            self.moe_router_group_topk = None
        if self.m2rnn_num_heads is None:
            self.m2rnn_num_heads = M2RNNSettings.of(self).heads(self.hidden_size)

    def _violations(self, pattern: HybridPattern) -> Iterator[str]:
        """Yield everything that cannot be built or would not be read as it is meant."""
        yield from config_violations(self, pattern)
        yield from side_channel_violations(self.side_channels, len(pattern))
        yield from self._field_violations()
        families = pattern.all_families
        mixers: list[Callable[[], object]] = [
            lambda: M2RNNSettings.of(self).heads(self.hidden_size)
        ]
        if self.mode == "mamba3":
            mixers.append(lambda: Mamba3Settings.of(self))
            if Family.MAMBA in families:
                mixers.append(lambda: Mamba3Settings.of(self).dimensions(self))
        messages: list[str] = []
        for settings in mixers:
            with collect_violations(messages):
                settings()
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
        """E blocks in the whole model, prediction depths included: what an auxiliary loss is
        averaged over."""
        return self.pattern.all_families.count(Family.EXPERT)


def config_violations(
    config: TransformerConfig, pattern: HybridPattern, hybrid: HybridFields | None = None
) -> Iterator[str]:
    """Yield what the hybrid stack cannot compute as it is set.

    Args:
        config: a :class:`HybridConfig`, or the plain one that Megatron's own scripts build.
        pattern: its layers.
        hybrid: with a plain configuration, the hybrid fields; their defaults if not given.
    """
    if isinstance(config, HybridConfig):
        assert hybrid is None, "a HybridConfig holds these fields itself"
        hybrid = config
    hybrid = hybrid or HybridFields()
    yield from prediction_violations(config, pattern, hybrid)
    yield from setting_violations(TransformerConfig, vars(config))
    yield from range_violations(config)
    present = dict.fromkeys(pattern.all_families)
    yield from ignored_violations(config, [family.value for family in present])
    yield from recompute_violations(config, [family.value for family in present])
    unbiased = {Family.RECURRENT} | ({Family.MAMBA} if hybrid.mode == "mamba3" else set())
    yield from bias_violations(config, [family.value for family in present if family in unbiased])
    clip = hybrid.m2rnn_state_gradient_clip
    if Family.RECURRENT in present and clip is not None and config.calculate_per_token_loss:
        yield (
            "calculate_per_token_loss=True scales gradients during the backward pass, where the R "
            "block bounds them. Turn it off, or set m2rnn_state_gradient_clip to null."
        )


def config_fields(
    model: Mapping[str, Any], layout: ParallelLayout, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Return the fields of the :class:`HybridConfig` of a model in a layout.

    Every configuration of the package is built from these: the one that is validated, planned,
    proved, resharded and trained.

    Args:
        model: fields without the layout's; the activation may be one of :data:`ACTIVATIONS`.
        layout: the parallel degrees.
        dtype: of parameters and activations.
        device: ``"cuda"`` or ``"cpu"``, which decides where weights are initialised.
    """
    activation = model.get("activation_func", F.silu)
    return {
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
        **model,
        "activation_func": ACTIVATIONS.get(activation, activation),
        **layout.megatron_fields(),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": device == "cpu",
    }
