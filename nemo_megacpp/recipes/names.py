"""The names of a recipe's settings: Megatron's field names and short names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemo_megacpp.errors import UserError, nearest
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.parallel import FIELD_OF, validate_given_once
from nemo_megacpp.printable import cut, printable, shown
from nemo_megacpp.recipes.training import Training
from nemo_megacpp.settings.transformer_verdicts import TRANSFORMER

RUN_KEYS = ("recipe", "data", "tokenizer", "run_dir", "resume", "init_from")
TEXTS = ("tokenizer", "run_dir", "resume", "init_from", "wandb_project", "wandb_name")
ALIASES = {
    "pattern": "hybrid_pattern",
    "depth": "num_layers",
    "global_bs": "global_batch_size",
    "top_k": "moe_router_topk",
    "learning_rate": "lr",
    "steps": "max_steps",
    "train_iters": "max_steps",
    "eval_interval": "val_check_interval",
    "eval_iters": "limit_val_batches",
    "lr_warmup_steps": "warmup_steps",
    "lr_warmup_iters": "warmup_steps",
    "lr_wsd_decay_iters": "lr_wsd_decay_steps",
}
_DERIVED = {
    **dict.fromkeys(
        ("bf16", "fp16", "params_dtype", "pipeline_dtype"), "it follows from precision (fp32, bf16)"
    ),
    **dict.fromkeys(
        ("dp", "dp_degree", "data_parallel", "data_parallel_size"),
        "it follows from the other degrees (world / (tp x cp x pp)), and the world from the ranks "
        "that are started, or from world_size",
    ),
    **dict.fromkeys(
        ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
        "packed_documents=true sets all three, and resets the states of M and R as well",
    ),
    "local_bs": "it is global_batch_size / DP, of which a rank computes micro_batch_size at a time",
    "moe_router_dtype": "routers always compute in fp32",
    "use_cpu_initialization": "it follows from the machine",
}
_WITHOUT = {
    "data": "the built-in corpus",
    "tokenizer": "the tokenizer of the data",
    "run_dir": "a new folder under runs/",
    "resume": "a run from scratch",
    "init_from": "random initial weights",
}
"""What null means."""
_LONGEST_PATH = 4096


def full_name(key: str) -> str:
    """Return the full field name for a key or one of its short names.

    Raises:
        UserError: there is no such setting, or it follows from others.
    """
    key = ALIASES.get(key, key)
    if key.lower() in _DERIVED:
        raise UserError(f"{key} is not a setting of a recipe: {_DERIVED[key.lower()]}.")
    if key.lower() in FIELD_OF:
        return FIELD_OF[key.lower()]
    owners = field_owners()
    if key not in owners:
        known = [*owners, *ALIASES, *FIELD_OF]
        raise UserError(f"There is no setting {shown(key)}.{nearest(key, known)}")
    return key


def full_names(
    settings: Mapping[str, Any], written: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return ``settings`` under their full names.

    Args:
        settings: by any of their names.
        written: filled with the name that was written, by full name.

    Raises:
        UserError: as `full_name`; a setting is given under two names, or empty.
    """
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in settings.items():
        name = full_name(str(key))
        validate_given_once(name, f"{key}={cut(str(value))}", spelled)
        if isinstance(value, str):
            validate_not_empty(name, str(key), value)
        given[name] = value
        if written is not None:
            written[name] = str(key)
    return given


def validate_not_empty(name: str, key: str, text: str) -> None:
    """Refuse a setting without a value, such as a command line's ``data=$UNSET``.

    Args:
        name: full name of the setting.
        key, text: name and value as written.
    """
    if not text.strip():
        null = f", or write {key}=null for {_WITHOUT[name]}" if name in _WITHOUT else ""
        raise UserError(f"{key} is empty. Leave {key} out for the recipe's own value{null}.")


def validate_path(key: str, path: str) -> str:
    """Return ``path``; refuse one that no file can have or that a terminal would obey.

    Raises:
        UserError: it is too long, or has control characters in it.
    """
    if len(path) > _LONGEST_PATH or printable(path) != path or "\n" in path:
        raise UserError(
            f"{key}: {shown(path)} cannot be used: a path or name has at most {_LONGEST_PATH:,} "
            f"characters, and no control characters."
        )
    return path


def field_owners() -> dict[str, str]:
    """Map every field name to the part of a recipe that it belongs to."""
    # Megatron's own are those in the table of settings: importing Megatron takes seconds.
    owners = dict.fromkeys(TRANSFORMER, "model")
    owners |= {f.name: "model" for f in dataclasses.fields(HybridFields)}
    owners |= dict.fromkeys(RUN_KEYS, "run")
    owners |= {f.name: "training" for f in dataclasses.fields(Training)}
    owners |= {f.name: "layout" for f in dataclasses.fields(ParallelLayout)}
    return owners
