"""A model's configuration as options: each field is written, has the script's default, or is
reported as one without an option."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import padded_vocab_size
from nemo_megacpp.megatron_args.dialect import Dialect
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.settings.combinations import OWN_MODULES
from nemo_megacpp.specs.named import CARRIED, SPEC_MODULE, spec_name

_ACTIVATIONS = {
    (F.silu, True): ["--swiglu"],
    (quick_gelu, True): ["--quick-geglu"],
    (squared_relu, False): ["--squared-relu"],
    (F.gelu, False): [],
}
"""Activation and gate -> options."""

_SET_BY_THE_SCRIPT = frozenset(
    {
        # Functions, which follow from init_method_std and its relatives.
        "init_method",
        "output_layer_init_method",
        "embedding_init_method",
        # They follow from --bf16.
        "params_dtype",
        "autocast_dtype",
        "pipeline_dtype",
        # How the pipeline is run, not what the model computes.
        "deallocate_pipeline_outputs",
        "batch_p2p_comm",
        "overlap_p2p_comm",
        "inference_sampling_seed",
        # What CUDA graphs capture, which are refused.
        "cuda_graph_scope",
        "cuda_graph_modules",
    }
)
_WRITTEN = frozenset(
    {
        "activation_func",
        "gated_linear_unit",
        "bias_activation_fusion",
        "cp_comm_type",
        "num_moe_experts",
        "num_query_groups",
        "persist_layer_norm",
        "virtual_pipeline_model_parallel_size",  # refused by the caller
    }
)
_WRITTEN_HYBRID = {
    "hybrid_pattern",
    "mode",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "share_embeddings_and_output_weights",
    "side_channels",  # refused below
}


def model_options(config: HybridConfig, dialect: Dialect) -> tuple[list[str], list[str]]:
    """Return the options of a model, and the settings without an option.

    Args:
        config: the model.
        dialect: of the Megatron-LM that will read them.
    """
    pattern, in_the_name = config.pattern, None
    if dialect.reads_the_pattern:
        # The script reads the number of virtual stages from the cuts.
        virtual = config.virtual_pipeline_model_parallel_size or 1
        pattern = config.pattern.cut_into(config.pipeline_model_parallel_size * virtual)
        in_the_name = str(
            pattern
        )  # Megatron's own has stand-ins for families that it does not know
    words = [
        *("--spec", SPEC_MODULE, spec_name(config, in_the_name)),
        *_pattern(pattern, dialect),
        *("--padded-vocab-size", str(_padded_vocab_size(config))),
        *("--max-position-embeddings", str(config.seq_length)),
    ]
    refusals: list[str] = []
    activation = _ACTIVATIONS.get((config.activation_func, config.gated_linear_unit))
    if activation is None:
        name = getattr(config.activation_func, "__name__", config.activation_func)
        gated = "with" if config.gated_linear_unit else "without"
        refusals.append(f"activation_func={name} {gated} a gate")
    words += activation or []
    if not config.bias_activation_fusion:
        words += ["--no-bias-swiglu-fusion", "--no-bias-gelu-fusion"]
    if not config.persist_layer_norm:
        words.append("--no-persist-layer-norm")
    if not config.share_embeddings_and_output_weights:
        words.append("--untie-embeddings-and-output-weights")
    if config.cp_comm_type not in (None, "p2p"):  # the script's default
        words += ["--cp-comm-type", config.cp_comm_type]
    if config.num_moe_experts is not None:
        words += ["--num-experts", str(config.num_moe_experts)]
    if config.num_query_groups != config.num_attention_heads:
        words += ["--group-query-attention", "--num-query-groups", str(config.num_query_groups)]

    if own := [name for name in config.recompute_modules or () if name in OWN_MODULES]:
        refusals.append(
            f"recompute_modules={own}: Megatron-Core {dialect.series} asserts that it knows them"
        )
    if config.side_channels:
        refusals.append(
            "side_channels: the script's dataset and its forward step know tokens alone"
        )
    carried = {*_SET_BY_THE_SCRIPT, *_WRITTEN, *_WRITTEN_HYBRID, *CARRIED}
    plain = {field.name for field in dataclasses.fields(TransformerConfig)}
    for field in dataclasses.fields(HybridConfig):
        if field.name in carried or not field.init:
            continue
        value = getattr(config, field.name)
        value = value.name if isinstance(value, Enum) else value
        if field.name in dialect.by_destination:
            found = dialect.words(field.name, value)
        else:
            # The script then has what TransformerConfig has.
            owner = TransformerConfig if field.name in plain else HybridConfig
            found = [] if value == _default(owner, field.name) else None
        if found is None:
            refusals.append(f"{field.name}={value!r}")
        words += found or []
    return words, refusals


def _pattern(pattern: HybridPattern, dialect: Dialect) -> list[str]:
    argument, name = dialect.pattern_argument, dialect.pattern_option
    text = pattern.to_megatron(argument, cuts=True, stand_ins=dialect.reads_the_pattern)
    # Without "=" argparse would read a pattern that starts with "-" as another option.
    return [f"{name}={text}"] if text.startswith("-") else [name, text]


def _padded_vocab_size(config: HybridConfig) -> int:
    return padded_vocab_size(
        config.vocab_size, config.make_vocab_size_divisible_by, config.tensor_model_parallel_size
    )


def _default(owner: type, name: str) -> Any:
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
