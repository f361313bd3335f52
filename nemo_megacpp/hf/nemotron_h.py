"""Export as transformers' ``nemotron_h``, which vLLM and others serve without our code.

The architecture's blocks are those of Megatron's Mamba-2 hybrids: attention without positions, a
Mamba-2 mixer, a mixture of ungated experts with a sigmoid router and a shared expert, a dense
ungated MLP. What it has not is refused, with all reasons at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.errors import raise_violations
from nemo_megacpp.hf.exchange import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Exchange,
    mamba2_exchanges,
    mamba_heads,
    same,
)
from nemo_megacpp.hf.export import Exported, embedding_of, write_export
from nemo_megacpp.hf.settings import activation_name, read_model
from nemo_megacpp.hf.tokenizer import FIND, Choice

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_megacpp.config import HybridConfig

MODEL_TYPE = "nemotron_h"
_LETTERS = {"A": "*", "M": "M", "E": "E", "F": "-"}
_MAMBA_NORM_EPS = 1e-5
_SMALLEST_STEP = 1e-20
"""``time_step_min``, to which transformers' plain torch path clamps; Megatron does not clamp."""
_SCORES_PER_GROUP = 2


def export_nemotron_h(
    source: Path, out: Path, *, dtype: str | None = None, tokenizer: Choice = FIND
) -> Exported:
    """Write a checkpoint's model as a ``NemotronHForCausalLM``.

    The names are those of the published checkpoints (``backbone.``, a matrix for each expert). For
    the arguments, what is returned and what is raised see
    :func:`nemo_megacpp.hf.export.export_hf`.
    """
    content = CheckpointContent(source)
    config = read_model(content, dtype)
    raise_violations(f"--to {MODEL_TYPE}: {reason}" for reason in violations(config))
    rows, kept = embedding_of(content, dtype)
    described = {
        **_described(config),
        "vocab_size": rows,
        "torch_dtype": kept,
        "source": {"prefix": content.prefix, "identity": content.identity},
    }
    return write_export(
        content, out, exchanges(config), described, dtype=dtype, tokenizer=tokenizer, code=[]
    )


def violations(config: HybridConfig) -> Iterator[str]:
    """Yield everything in a model that the architecture has not."""
    letters = set(config.pattern.letters)
    if "R" in letters:
        yield "R blocks: the architecture has attention, Mamba-2, experts and MLPs."
    if "M" in letters and config.mode != "nemo_native":
        yield f"mode={config.mode!r}: its M blocks are Mamba-2 (mode='nemo_native')."
    if "M" in letters and config.layernorm_epsilon != _MAMBA_NORM_EPS:
        yield (
            f"layernorm_epsilon={config.layernorm_epsilon}: it has one epsilon, and that of "
            f"Mamba-2's gated norm is {_MAMBA_NORM_EPS}."
        )
    if config.share_embeddings_and_output_weights:
        yield "share_embeddings_and_output_weights=True: its head has weights of its own."
    if config.add_bias_linear:
        yield "add_bias_linear=True: its attention has no biases."
    if "A" in letters:
        yield from _attention_violations(config)
    if letters & {"E", "F"}:
        name = activation_name(config)
        if config.gated_linear_unit or name != "relu2":
            gated = "with" if config.gated_linear_unit else "without"
            yield f"activation {name} {gated} a gate: its experts and MLPs have relu2 without one."
    if "E" in letters:
        yield from _expert_violations(config)


def _attention_violations(config: HybridConfig) -> Iterator[str]:
    if config.position_embedding_type != "none":
        yield (
            f"position_embedding_type={config.position_embedding_type!r}: its attention has no "
            f"positions ('none')."
        )
    for name in ("softmax_scale", "attention_output_gate", "add_qkv_bias"):
        if value := getattr(config, name):
            yield f"{name}={value}: its attention has none."


def _expert_violations(config: HybridConfig) -> Iterator[str]:
    if config.moe_router_score_function != "sigmoid":
        yield (
            f"moe_router_score_function={config.moe_router_score_function!r}: its router has "
            f"'sigmoid'."
        )
    if not config.moe_shared_expert_intermediate_size:
        yield "no moe_shared_expert_intermediate_size: it has a shared expert."
    for name in ("moe_shared_expert_gate", "moe_apply_probs_on_input"):
        if getattr(config, name):
            yield f"{name}=True: it has none."
    if config.moe_router_dtype is None:
        yield "moe_router_dtype=None: it computes the scores in float32."
    if groups := config.moe_router_group_topk:
        each = config.moe_router_topk // groups
        if each != _SCORES_PER_GROUP:
            yield (
                f"moe_router_topk={config.moe_router_topk} from moe_router_group_topk={groups} "
                f"groups: Megatron ranks a group by its best {each}, the architecture by its best "
                f"{_SCORES_PER_GROUP}."
            )


def _described(config: HybridConfig) -> dict[str, Any]:
    letters = config.pattern.letters
    fields: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
        "hybrid_override_pattern": "".join(_LETTERS[letter] for letter in letters),
        "num_hidden_layers": len(letters),
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.seq_length,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "intermediate_size": config.ffn_hidden_size,
        "mlp_hidden_act": "relu2",
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
        "tie_word_embeddings": False,
        "num_logits_to_keep": 1,
    }
    if "M" in letters:
        heads = mamba_heads(config)
        fields |= {
            "mamba_num_heads": heads,
            "mamba_head_dim": config.mamba_head_dim,
            "ssm_state_size": config.mamba_state_dim,
            "n_groups": config.mamba_num_groups,
            "conv_kernel": 4,
            "chunk_size": 128,
            "expand": max(1, heads * config.mamba_head_dim // config.hidden_size),
            "time_step_min": _SMALLEST_STEP,
        }
    if "E" in letters:
        fields |= {
            "n_routed_experts": config.num_moe_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": config.moe_router_topk,
            "moe_intermediate_size": config.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
            "n_group": config.moe_router_num_groups or 1,
            "topk_group": config.moe_router_group_topk or 1,
            "norm_topk_prob": config.moe_router_topk > 1,
            "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
        }
    return fields


def exchanges(config: HybridConfig) -> list[Exchange]:
    """Return the tensors of a checkpoint and those of the architecture."""
    found = [same(EMBEDDING, "backbone.embeddings.weight")]
    for number, letter in enumerate(config.pattern.letters):
        ours, theirs = f"decoder.layers.{number}.", f"backbone.layers.{number}."
        norm = {
            "A": "self_attention.linear_qkv.layer_norm_weight",
            "M": "mixer.in_proj.layer_norm_weight",
            "E": "pre_mlp_layernorm.weight",
            "F": "mlp.linear_fc1.layer_norm_weight",
        }[letter]
        found.append(same(ours + norm, f"{theirs}norm.weight"))
        theirs += "mixer."
        if letter == "A":
            found.append(_queries_keys_values(config, ours, theirs))
            found.append(same(f"{ours}self_attention.linear_proj.weight", f"{theirs}o_proj.weight"))
        elif letter == "M":
            found += mamba2_exchanges(config, f"{ours}mixer.", theirs)
        elif letter == "E":
            found += _experts(config, f"{ours}mlp.", theirs)
        else:
            found += _matrices(f"{ours}mlp.", theirs)
    return [*found, same(FINAL_NORM, "backbone.norm_f.weight"), same(HEAD, "lm_head.weight")]


def _matrices(ours: str, theirs: str) -> list[Exchange]:
    return [
        same(f"{ours}linear_fc1.weight", f"{theirs}up_proj.weight"),
        same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight"),
    ]


def _queries_keys_values(config: HybridConfig, ours: str, theirs: str) -> Exchange:
    """Megatron's rows go group by group: its queries, its key, its value."""
    groups, dim = int(config.num_query_groups or config.num_attention_heads), config.kv_channels
    queries = config.num_attention_heads // groups

    def there(rows: Sequence[Tensor]) -> list[Tensor]:
        heads = rows[0].unflatten(0, (groups, queries + 2, dim))
        parts = heads.split([queries, 1, 1], dim=1)
        return [part.flatten(0, 2).contiguous() for part in parts]

    def back(parts: Sequence[Tensor]) -> list[Tensor]:
        import torch

        heads = [part.unflatten(0, (groups, -1, dim)) for part in parts]
        return [torch.cat(heads, dim=1).flatten(0, 2)]

    names = tuple(f"{theirs}{each}_proj.weight" for each in "qkv")
    return Exchange((f"{ours}self_attention.linear_qkv.weight",), names, there, back)


def _experts(config: HybridConfig, ours: str, theirs: str) -> Iterator[Exchange]:
    count = int(config.num_moe_experts or 0)
    yield same(f"{ours}router.weight", f"{theirs}gate.weight")
    bias = f"{theirs}gate.e_score_correction_bias"
    if config.moe_router_enable_expert_bias:
        yield same(f"{ours}router.expert_bias", bias)
    else:
        yield Exchange((), (bias,), lambda _: _zeros(count), lambda _: [])
    for each, name in ((1, "up_proj"), (2, "down_proj")):
        names = tuple(f"{theirs}experts.{number}.{name}.weight" for number in range(count))
        ours_name = f"{ours}experts.experts.linear_fc{each}.weight"
        yield Exchange((ours_name,), names, lambda bank: list(bank[0].unbind()), _stack)
    yield from _matrices(f"{ours}shared_experts.", f"{theirs}shared_experts.")


def _zeros(count: int) -> list[Tensor]:
    import torch

    return [torch.zeros(count)]


def _stack(matrices: Sequence[Tensor]) -> list[Tensor]:
    import torch

    return [torch.stack(list(matrices))]
