"""The settings of a recipe as text for a terminal: groups, defaults and meaning. Loads no torch."""

from __future__ import annotations

import textwrap

from nemo_megacpp.recipes.training import Training, groups
from nemo_megacpp.values import bounds, choices, field_hints

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
    "init_from": "checkpoint, run or Hugging Face folder whose weights a new run starts from",
}
_MODEL = {
    "pattern": "block families of the layers, as AEMEAEMEAEMR; | cuts the pipeline",
    "depth": "num_layers, to which the pattern is tiled",
    "mode": "mixer of M blocks: nemo_native (Mamba-2) or mamba3",
    "ffn_hidden_size": "width of the MLP of F blocks",
    "…": "any other field of Megatron's TransformerConfig, m2rnn_* and mamba3_*, by its own name; "
    "'nemo-megacpp settings' lists which may be set, and why",
}
_WIDTH = 100
_NAME = 28


def settings_help() -> str:
    """Return the settings of ``key=value``, grouped, with the defaults of a recipe without a base.

    The named recipes have values of their own: ``nemo-megacpp recipes NAME`` prints them.
    """
    parts = ["settings, as key=value ('nemo-megacpp recipes NAME' prints a recipe's values):"]
    for title, entries in (("layout", _LAYOUT), ("model", _MODEL), ("run", RUN_SETTINGS)):
        parts += [f"\n {title}", *(_line(name, text) for name, text in entries.items())]
    for title, names in groups().items():
        parts += [
            f"\n {title}",
            *(_line(name, f"{_meaning(name)} [{_default(name)}]") for name in names),
        ]
    return "\n".join(parts)


def meanings() -> dict[str, str]:
    """Return what each field of :class:`Training` means, with its choices or range."""
    return {name: _meaning(name) for names in groups().values() for name in names}


def _default(name: str) -> str:
    field = Training.__pydantic_fields__[name]  # type: ignore[attr-defined]
    default = field.get_default(call_default_factory=True)
    text = "null" if default is None else str(default)
    return text.lower() if isinstance(default, bool) else text


def _meaning(name: str) -> str:
    field = Training.__pydantic_fields__[name]  # type: ignore[attr-defined]
    hint = field_hints(Training)[name]
    text = " ".join((field.description or "").replace("``", "").split()).rstrip(".")
    legal = ", ".join(choices(hint)) or bounds(hint)
    return f"{text}{f' ({legal})' if legal else ''}"


def _line(name: str, text: str) -> str:
    first, later = f"  {name}".ljust(_NAME), " " * _NAME
    return textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
    )
