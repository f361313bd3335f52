"""NeMo recipe factories: ``nemo llm pretrain --factory nam56r``.

The entry point group ``nemo_run.cli`` leads NeMo's command line here. A factory resolves a recipe
of the catalogue, validates it as ``nemo-megacpp train`` does, and returns its NeMo-Run
configuration. All factories have the same parameters: the settings of a run, the degrees, and how
many ranks to start.
"""

# ruff: noqa: UP007, UP045

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.parallel import FIELD_OF, validate_given_once
from nemo_megacpp.nemo.versions import REQUIREMENT, describe_mismatch
from nemo_megacpp.preflight import preflight
from nemo_megacpp.preflight.model_checks import validate_recipe_layout
from nemo_megacpp.preflight.outputs import new_run_dir, validate_shared
from nemo_megacpp.printable import say, screenful
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.describe import RUN_SETTINGS, meanings
from nemo_megacpp.recipes.names import validate_not_empty
from nemo_megacpp.recipes.recipe import Recipe, from_mapping
from nemo_megacpp.recipes.training import Training
from nemo_megacpp.runs.run_lock import validate_not_running
from nemo_megacpp.runtime.launch import launched


def _refuse_to_load(reason: str) -> NoReturn:
    """Say why there are no factories: NeMo-Run would report "No matching factory found"."""
    if _on_nemo_command_line() and any(name in word for word in sys.argv[1:] for name in CATALOG):
        say(f"nemo_megacpp: {reason}", error=True)
        sys.exit(2)
    raise ImportError(reason)


def _on_nemo_command_line() -> bool:
    """Return whether this is the program ``nemo``, which turns any exception into exit code 1."""
    return "nemo_run.__main__" in sys.modules


if mismatch := describe_mismatch():
    _refuse_to_load(f"{REQUIREMENT}, but {mismatch}.")
try:
    import nemo_run as run
    from nemo.collections import llm
    from nemo.utils.get_rank import is_global_rank_zero

    from nemo_megacpp.nemo.pretrain_task import to_pretrain
except Exception as error:
    _refuse_to_load(f"{REQUIREMENT}. They are installed but do not load: {error}")

_RANKS = {
    "num_nodes": "nodes; default: the launcher's, or 1",
    "devices": "ranks per node; default: the launcher's, or what the layout needs",
    "num_gpus_per_node": "devices, as NeMo's recipes name it",
}
_NEMO_NAMES = (
    *("tensor_parallelism", "sequence_parallelism", "context_parallelism"),
    *("pipeline_parallelism", "virtual_pipeline_parallelism", "expert_parallelism"),
    "expert_tensor_parallelism",
)
_WIDTH = 54
"""Of the docstrings' lines: ``nemo llm pretrain --help --docs`` cuts longer ones."""


def _parameters() -> dict[str, tuple[Any, str]]:
    """Return type and meaning of every parameter of a factory, by name."""
    types, known = typing.get_type_hints(Training), meanings()
    degrees = {f.name: bool if f.name.startswith("sequence") else int for f in _degrees()}
    found: dict[str, tuple[Any, str]] = {
        name: (kind, "Megatron's field; default: the recipe's") for name, kind in degrees.items()
    }
    found["sequence_parallel"] = (bool, "TP's activation layout; default: on where TP > 1")
    for name in _NEMO_NAMES:
        found[name] = (degrees[FIELD_OF[name]], f"{FIELD_OF[name]}, as NeMo's recipes name it")
    found |= {name: (int, meaning) for name, meaning in _RANKS.items()}
    found["seq_length"] = (int, "tokens per row")
    found |= {name: (str, meaning) for name, meaning in RUN_SETTINGS.items()}
    found["data"] = (Union[dict[str, float], list[str], str], RUN_SETTINGS["data"])
    return found | {name: (types[name], meaning) for name, meaning in known.items()}


def _degrees() -> list[Any]:
    return [f for f in dataclasses.fields(ParallelLayout) if f.name != "world_size"]


def _optional(kind: Any) -> Any:
    """Return a type as NeMo-Run parses it: ``Optional[int]``, where it rejects ``int | None``."""
    options = [t for t in typing.get_args(kind) if t is not type(None)]
    is_union = typing.get_origin(kind) not in (list, dict, typing.Literal)
    return Optional[Union[tuple(options)]] if options and is_union else Optional[kind]


PARAMETERS = _parameters()
_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, (given, _) in PARAMETERS.items()
        for kind in [_optional(given)]
    ],
    return_annotation=run.Partial,
)


def _docstring(summary: str) -> str:
    """Return a docstring of Google's form for a factory."""
    lines = [*textwrap.wrap(f"Pre-train {summary}.", _WIDTH), "", "Args:"]
    for name, (_, meaning) in PARAMETERS.items():
        entry = textwrap.wrap(f"{name}: {meaning}.", _WIDTH - 4, subsequent_indent="    ")
        lines += [f"    {line}" for line in entry]
    return "\n".join(lines)


def _factory(name: str) -> Callable[..., run.Partial]:
    """Return the factory of recipe ``name``, registered with NeMo-Run."""

    def factory(**settings: Any) -> run.Partial:
        _SIGNATURE.bind(**settings)
        return _pretrain(name, **{k: v for k, v in settings.items() if v is not None})

    factory.__name__ = factory.__qualname__ = name
    # NeMo-Run reads names and types of parameters from these.
    factory.__annotations__ = {name: p.annotation for name, p in _SIGNATURE.parameters.items()}
    factory.__annotations__["return"] = run.Partial
    factory.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
    factory.__doc__ = _docstring(CATALOG[name].summary)
    return run.cli.factory(factory, target=llm.pretrain, name=name)


nam56r = _factory("nam56r")
nam56r_mamba3 = _factory("nam56r_mamba3")
nam52 = _factory("nam52")
nam52_mamba3 = _factory("nam52_mamba3")
nam56r_tiny = _factory("nam56r_tiny")
nam56r_tiny_mamba3 = _factory("nam56r_tiny_mamba3")


def _pretrain(
    name: str,
    *,
    devices: Optional[int] = None,
    num_gpus_per_node: Optional[int] = None,
    num_nodes: Optional[int] = None,
    **settings: Any,
) -> run.Partial:
    """Return the configuration of recipe ``name`` with these settings."""
    try:
        if _on_nemo_command_line():
            validate_not_repeated(sys.argv[1:])
        if None not in (devices, num_gpus_per_node):
            raise UserError("devices and num_gpus_per_node are two names of one number; give one.")
        devices = num_gpus_per_node if devices is None else devices
        recipe = from_mapping({"recipe": name, **settings})
        recipe, devices, num_nodes = _place(recipe, devices, num_nodes)
        if recipe.run_dir is None and recipe.resume != "auto":
            by_parent = launched() is not None or not is_global_rank_zero()
            recipe = dataclasses.replace(recipe, run_dir=new_run_dir(name, by_parent))
        if recipe.run_dir is not None and is_global_rank_zero():
            validate_not_running(Path(recipe.run_dir))
        settled = preflight(recipe, announce=is_global_rank_zero())
    except UserError as error:
        if not _on_nemo_command_line():
            raise
        say(screenful(f"{name}: {error}"), error=True)
        sys.exit(2)
    config = to_pretrain(settled.recipe, settled.run_dir, devices=devices, num_nodes=num_nodes)
    config.log.skipped = [str(path) for path in settled.skipped]
    return config


def _place(
    recipe: Recipe, devices: Optional[int], num_nodes: Optional[int]
) -> tuple[Recipe, int, int]:
    """Return the recipe with its number of ranks settled, ranks per node, and nodes.

    A launcher decides on the ranks, if there is one.
    """
    if (here := launched()) is not None:
        nodes = here.world_size // here.local_world_size
        found = {"devices": here.local_world_size, "num_nodes": nodes}
        for name, given in (("devices", devices), ("num_nodes", num_nodes)):
            if given not in (None, found[name]):
                raise UserError(
                    f"{name}={given}, but the launcher has started {found[name]}. Leave {name} "
                    f"out, or change the launcher's number."
                )
        validate_shared(recipe.run_dir, nodes)
        devices, num_nodes = here.local_world_size, nodes
    num_nodes = 1 if num_nodes is None else num_nodes
    ranks = recipe.layout.world
    if devices is None and num_nodes > 0 and ranks % num_nodes == 0:
        devices = ranks // num_nodes
    if devices is None or min(devices, num_nodes) < 1:
        raise UserError(
            f"num_nodes={num_nodes}, devices={devices}: the layout needs a multiple of {ranks} "
            f"ranks; give num_nodes and devices (ranks per node) whose product is one."
        )
    if devices * num_nodes != ranks:
        layout = dataclasses.replace(recipe.layout, world_size=devices * num_nodes)
        recipe = dataclasses.replace(recipe, layout=layout)
    if num_nodes > 1:
        validate_recipe_layout(recipe, gpus_per_node=devices)
    return recipe, devices, num_nodes


_FACTORY = re.compile(r"(?:--factory=)?[\w.]+\((.*)\)", re.DOTALL)
_SETTING = re.compile(r"[\w.\[\]]+=")  # not +=, which may be repeated


def validate_not_repeated(words: Iterable[str]) -> None:
    """Refuse a parameter, or an override in dots, that is given twice or empty.

    NeMo's command line uses the last of two without a message.

    Args:
        words: ``--factory``, ``"nam56r(max_steps=20, data=…)"``, ``trainer.max_steps=2``, ….

    Raises:
        UserError: with both spellings.
    """
    overrides: dict[str, str] = {}
    for word in words:
        if factory := _FACTORY.fullmatch(word.strip()):
            parameters: dict[str, str] = {}
            for entry in factory[1].split(","):  # as NeMo-Run splits it
                key, separator, value = (part.strip() for part in entry.partition("="))
                if separator:
                    name = FIELD_OF.get(key, key)
                    validate_not_empty(name, key, value)
                    validate_given_once(name, f"{key}={value}", parameters)
        elif _SETTING.match(word):
            key, _, value = word.partition("=")
            validate_not_empty(key, key, value)
            validate_given_once(key, word, overrides)
