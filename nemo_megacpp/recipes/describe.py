"""The settings of a recipe as text for a terminal: groups, defaults and meaning. Loads no torch."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap

from nemo_megacpp.recipes.catalog import Training

GROUPS: dict[str, tuple[str, ...]] = {
    "batch": ("micro_batch_size", "global_batch_size", "packed_documents"),
    "steps": ("max_steps", "stop_after", "seed"),
    "optimizer": (
        *("lr", "min_lr", "warmup_steps", "weight_decay", "adam_beta2", "clip_grad"),
        *("use_distributed_optimizer", "precision"),
    ),
    "evaluation and logging": (
        *("val_check_interval", "limit_val_batches", "log_interval", "tensorboard"),
        *("wandb_project", "wandb_name"),
    ),
    "profiler": (
        *("use_pytorch_profiler", "profile_step_start", "profile_step_end", "profile_ranks"),
    ),
    "checkpoints": ("save_interval", "async_save", "keep_last", "keep_every", "verify_checkpoint"),
}
"""Every field of :class:`Training`, once."""

_LAYOUT = {
    "tp": "tensor_model_parallel_size",
    "sp": "sequence_parallel; on where TP > 1, unless given",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size, chunks per stage",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "world": "world_size, all ranks; what the degrees leave is data-parallel",
}
RUN_SETTINGS = {
    "data": "folder of 'data prepare', a list, or weights by folder; null: the built-in corpus",
    "tokenizer": "folder of the tokenizer that the data must have been made with",
    "run_dir": "folder to write; default: a new one under runs/",
    "resume": "checkpoint or run folder to resume, or auto for the newest in run_dir",
}
_MODEL = {
    "pattern": "block families of the layers, as AEMEAEMEAEMR; | cuts the pipeline",
    "depth": "num_layers, to which the pattern is tiled",
    "mode": "mixer of M blocks: nemo_native (Mamba-2) or mamba3",
    "…": "any other field of Megatron's TransformerConfig, m2rnn_* and mamba3_*, by its own name; "
    "'nemo-megacpp settings' lists which may be set, and why",
}
_WIDTH = 100
_NAME = 28


def settings_help() -> str:
    """Return the settings of ``key=value``, grouped, with the defaults of a recipe without a base.

    The named recipes have values of their own: ``nemo-megacpp recipes NAME`` prints them.
    """
    known = meanings()
    parts = ["settings, as key=value ('nemo-megacpp recipes NAME' prints a recipe's values):"]
    for title, entries in (("layout", _LAYOUT), ("model", _MODEL), ("run", RUN_SETTINGS)):
        parts += [f"\n {title}", *(_line(name, text) for name, text in entries.items())]
    defaults = dataclasses.asdict(Training())
    for title, names in GROUPS.items():
        parts.append(f"\n {title}")
        parts += [_line(name, f"{known[name]} [{_shown(defaults[name])}]") for name in names]
    return "\n".join(parts)


def meanings() -> dict[str, str]:
    """Return what each field of :class:`Training` means, from its docstring."""
    text = inspect.getdoc(Training) or ""
    entries = re.findall(r"^    (\w+): (.+?)(?=^    \w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: " ".join(words.replace("``", "").split()).rstrip(".") for name, words in entries}


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _line(name: str, text: str) -> str:
    first, later = f"  {name}".ljust(_NAME), " " * _NAME
    return textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
    )
