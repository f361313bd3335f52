"""Weights of Mamba-2 models from elsewhere: transformers' ``Mamba2ForCausalLM`` and the files of
mamba_ssm (``state-spaces/mamba2-*``). Their pattern is ``M`` for each layer.

Both have Megatron's rows, ``[z | x | B | C | dt]``, and its norm in front of each mixer. They
differ in the gated norm, which transformers takes over all channels and Megatron over each group's:
that is the same with one group only. The rows of a vocabulary that was padded there are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.checkpoint.identity import Identity
from nemo_megacpp.data.tokenizer import fingerprint
from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.hf.exchange import EMBEDDING, FINAL_NORM, HEAD, Exchange, mamba2_exchanges, same
from nemo_megacpp.hf.folder import CONFIG
from nemo_megacpp.hf.settings import build_config

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "mamba2"
_TOKENIZER = "tokenizer.json"
_MAMBA_NORM_EPS = 1e-5
_DIVISIBLE = 128
_NO_LIMIT = [0.0, math.inf]
_LM_HEAD = "lm_head.weight"


def is_mamba_ssm(config: Mapping[str, Any]) -> bool:
    """Whether this is the ``config.json`` of a model that mamba_ssm has saved."""
    return "model_type" not in config and "ssm_cfg" in config and "d_model" in config


def describe(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Identity, list[Exchange]]:
    """Return the identity that the model has as a checkpoint, and where its tensors go.

    Args:
        folder: for errors, and for the tokenizer, if there is one.
        config: its ``config.json``.
        tensors: its weights.

    Raises:
        UserError: naming every setting that an M block has not.
    """
    read = _of_mamba_ssm if is_mamba_ssm(config) else _of_transformers
    try:
        model, refusals, embedding = read(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}.") from None
    raise_violations(f"{folder / CONFIG}: {refusal}" for refusal in refusals)
    if embedding not in tensors:
        raise UserError(f"{folder} has no {embedding}.")
    rows = len(tensors[embedding])
    model |= {"vocab_size": rows, "make_vocab_size_divisible_by": math.gcd(rows, _DIVISIBLE)}
    moves = _moves(model, tensors, embedding)
    known = fingerprint(folder) if (folder / _TOKENIZER).exists() else None
    return {"model": model, "tokenizer": known, "step": 0, "layout": "tp=1"}, moves


def _of_transformers(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], str]:
    groups, eps = config.get("n_groups", 8), config.get("layer_norm_epsilon", _MAMBA_NORM_EPS)
    refusals = list(
        _unlike(config, use_bias=False, use_conv_bias=True, conv_kernel=4, rms_norm=True)
    )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refusals.append(f"hidden_act={config['hidden_act']!r}: an M block has silu.")
    if groups != 1:
        refusals.append(
            f"n_groups={groups}: transformers takes the gated norm over all channels, an M block "
            f"over each group's; they agree with one group only."
        )
    if eps != _MAMBA_NORM_EPS:
        refusals.append(
            f"layer_norm_epsilon={eps}: the gated norm of an M block has {_MAMBA_NORM_EPS}."
        )
    if list(config.get("time_step_limit", _NO_LIMIT)) != _NO_LIMIT:
        refusals.append(
            f"time_step_limit={config['time_step_limit']}: an M block does not limit its step size."
        )
    sizes = (config["num_heads"], config["head_dim"], config["state_size"], groups)
    model = _model(config["hidden_size"], config["num_hidden_layers"], *sizes)
    model |= {
        "layernorm_epsilon": eps,
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
    }
    return model, refusals, "backbone.embeddings.weight"


def _of_mamba_ssm(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], str]:
    ssm = dict(config["ssm_cfg"])
    refusals = []
    if ssm.pop("layer", "Mamba1") != "Mamba2":
        refusals.append("ssm_cfg.layer is not 'Mamba2': an M block is.")
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        refusals.append("attn_layer_idx or d_intermediate: only models of Mamba-2 alone are read.")
    width = config["d_model"] * ssm.pop("expand", 2)
    dim, size, groups = ssm.pop("headdim", 64), ssm.pop("d_state", 128), ssm.pop("ngroups", 1)
    refusals += _unlike(
        ssm,
        d_conv=4,
        bias=False,
        conv_bias=True,
        rmsnorm=True,
        norm_before_gate=False,
        D_has_hdim=False,
        dt_limit=_NO_LIMIT,
        d_ssm=None,
    )
    refusals += _unlike(config, rms_norm=True)
    model = _model(config["d_model"], config["n_layer"], width // dim, dim, size, groups)
    # A model without this setting is older than it, and its head is tied.
    model["share_embeddings_and_output_weights"] = bool(config.get("tie_embeddings", True))
    return model, refusals, "backbone.embedding.weight"


def _unlike(settings: Mapping[str, Any], **wanted: Any) -> Iterator[str]:
    for name, value in wanted.items():
        found = settings.get(name, value)
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            yield f"{name}={found!r}: an M block has {value!r}."


def _model(
    hidden: int, layers: int, heads: int, dim: int, size: int, groups: int
) -> dict[str, Any]:
    return {
        "hybrid_pattern": "M" * int(layers),
        "num_layers": int(layers),
        "mode": "nemo_native",
        "hidden_size": hidden,
        "num_attention_heads": 1,  # of no block; Megatron wants a number
        "mamba_num_heads": heads,
        "mamba_head_dim": dim,
        "mamba_state_dim": size,
        "mamba_num_groups": groups,
        "layernorm_epsilon": _MAMBA_NORM_EPS,
        "position_embedding_type": "none",
    }


def _moves(model: dict[str, Any], tensors: Mapping[str, Tensor], embedding: str) -> list[Exchange]:
    config = build_config(model, tensors[embedding].dtype)
    moves = []
    if not config.share_embeddings_and_output_weights:
        moves += [same(EMBEDDING, embedding), same(HEAD, _LM_HEAD)]
    elif _LM_HEAD in tensors:
        moves.append(Exchange((EMBEDDING,), (embedding, _LM_HEAD), _twice, _once))
    else:
        moves.append(same(EMBEDDING, embedding))
    for number in range(config.num_layers):
        ours, theirs = f"decoder.layers.{number}.mixer.", f"backbone.layers.{number}."
        moves.append(same(f"{ours}in_proj.layer_norm_weight", f"{theirs}norm.weight"))
        moves += mamba2_exchanges(config, ours, f"{theirs}mixer.")
    return [*moves, same(FINAL_NORM, "backbone.norm_f.weight")]


def _twice(embedding: Sequence[Tensor]) -> list[Tensor]:
    return [embedding[0], embedding[0]]


def _once(both: Sequence[Tensor]) -> list[Tensor]:
    if not both[0].equal(both[1]):
        raise UserError("The embeddings are tied, and the head has other numbers.")
    return [both[0]]
