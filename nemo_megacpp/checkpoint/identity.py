"""What a checkpoint is a checkpoint of: written beside its weights, read before they are loaded."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.errors import UserError

FILE = "nemo_megacpp.json"
DELETING = ".deleting"
"""Ends the name of a checkpoint that is being removed."""

_log = logging.getLogger(__name__)

STRUCTURE = (
    "mode",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "mamba_num_groups",
    "m2rnn_num_heads",
    "m2rnn_key_head_dim",
    "m2rnn_value_head_dim",
    "mamba3_mimo_rank",
    "mamba3_rope_fraction",
    "mamba3_output_norm",
    "mamba3_pairs",
    "mamba3_A_activation",
    "mamba3_A_floor",
    "m2rnn_conv_kernel",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "gated_linear_unit",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_gate",
    "share_embeddings_and_output_weights",
)
"""What decides the shape or the meaning of a saved tensor. Everything else of a model
(coefficients, clips, sequence length) may change between two runs from one checkpoint."""


def write_identity(directory: Path, identity: Mapping[str, Any], step: int) -> None:
    """Write ``identity`` and the step into a checkpoint's folder, atomically and durably."""
    text = json.dumps({**identity, "step": step}, indent=1, sort_keys=True)
    partial = directory / f"{FILE}.partial"
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(directory / FILE)


def read_identity(directory: Path) -> dict[str, Any] | None:
    """Return what :func:`write_identity` wrote, or None for a checkpoint from elsewhere.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(identity, dict) or not {"model", "tokenizer", "step"} <= identity.keys():
        raise UserError(f"{path} is damaged: it does not say model, tokenizer and step.")
    return identity


def is_whole(directory: Path) -> bool:
    """Say whether a checkpoint of ours was saved to the end, and nothing of it has gone since.

    Its manifest says so; where the identity speaks of no manifest (it used to be written last),
    the identity alone.

    Raises:
        UserError: the identity is damaged.
    """
    identity = read_identity(directory)
    if identity is None:
        return False
    if "manifest" in identity or (directory / manifest.FILE).exists():
        return manifest.is_complete(directory)
    return True


def whole_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of every whole checkpoint in ``folder``, oldest first.

    One that carries a manifest and does not match it is passed over, with a line that says so.

    Raises:
        UserError: an identity is damaged.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir() or path.name.endswith(DELETING):
            continue
        identity = read_identity(path)
        if identity is None:
            continue
        if is_whole(path):
            found.append((identity["step"], path))
        elif (path / manifest.FILE).exists():
            _log.warning("%s does not match its manifest and is passed over.", path)
    return sorted(found)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the largest step among the whole ones in ``folder``."""
    found = whole_checkpoints(folder)
    return found[-1][1] if found else None


def validate_same_model(
    directory: Path, model: Mapping[str, Any], letters: str, tokenizer: str | None
) -> None:
    """Refuse to load a checkpoint whose tensors mean something else.

    Args:
        directory: the checkpoint.
        model: fields of the model that will load it.
        letters: its families, one letter per layer, without cuts.
        tokenizer: fingerprint of the tokenizer of its data; None if that is not known yet.

    Raises:
        UserError: listing every difference.
    """
    from nemo_megacpp.config import HybridConfig
    from nemo_megacpp.pattern import HybridPattern

    identity = read_identity(directory)
    if identity is None:
        return
    # A field that one side leaves out and the other spells out is no difference.
    defaults = {field.name: field.default for field in dataclasses.fields(HybridConfig)}
    saved, model = {**defaults, **identity["model"]}, {**defaults, **model}
    saved_letters = HybridPattern.parse(saved["hybrid_pattern"], depth=saved["num_layers"]).letters
    differences = [
        f"{name} is {saved.get(name)} there and {model.get(name)} here"
        for name in STRUCTURE
        if saved.get(name) != model.get(name)
    ]
    if saved_letters != letters:
        differences.append(f"the pattern is {saved_letters} there and {letters} here")
    other = identity["tokenizer"]  # None where the run had data of another kind
    if tokenizer is not None and other is not None and other != tokenizer:
        differences.append(
            f"its data was made with another tokenizer ({other[:12]} there, {tokenizer[:12]} here)"
        )
    if differences:
        raise UserError(
            f"{directory} is a checkpoint of another model: " + "; ".join(differences) + "."
        )
