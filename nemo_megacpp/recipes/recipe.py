"""From a recipe's name, a YAML file and ``key=value`` overrides to one resolved recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_megacpp.data.builtin import MAX_VOCAB_SIZE
from nemo_megacpp.errors import UserError, collect_violations, nearest, raise_violations
from nemo_megacpp.families import load_families
from nemo_megacpp.hybrid_fields import HybridFields, size_violations
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import CUT, HybridPattern
from nemo_megacpp.printable import say, shown
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.given import read_command_line, read_yaml
from nemo_megacpp.recipes.names import RUN_KEYS, field_owners, full_names, validate_path
from nemo_megacpp.recipes.sources import Sources, read_sources
from nemo_megacpp.recipes.training import Training, read_training
from nemo_megacpp.runtime.launch import speaks_for_job
from nemo_megacpp.values import read_value

DEFAULT_BASE = "nam56r_tiny"
"""The base of a YAML file that names none."""

_WARMUP_SHARE = 5
"""Where the user gives max_steps, the recipe's warm-up takes at most this share of them: 1/5."""
_FOLLOWS = {
    "micro_batch_size": "a row is a pack of documents",
    "warmup_steps": f"max_steps / {_WARMUP_SHARE}",
}
"""Settings that follow from others unless they are given -> why."""


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        name: of the base in the catalogue.
        model: fields of :class:`nemo_megacpp.config.HybridConfig`.
        layout: the parallel layout.
        training: the run's settings.
        data: folder written by ``nemo-megacpp data prepare``, or a blend: weights by folder; None
            for the built-in corpus.
        tokenizer: folder of the tokenizer that the data must have been made with; None: any.
        run_dir: where the run writes; None for a new folder under ``runs/``.
        resume: checkpoint to resume, or ``auto`` for the newest in ``run_dir``.
        init_from: checkpoint whose weights a new run starts from, at step 0.
        given: full names of the settings that the user gave.
        defaults: the defaults that were taken, one phrase each.
    """

    name: str
    model: dict[str, Any]
    layout: ParallelLayout
    training: Training
    data: Sources | None = None
    tokenizer: str | None = None
    run_dir: str | None = None
    resume: str | None = None
    init_from: str | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)
    defaults: tuple[str, ...] = field(default=(), compare=False)

    @property
    def pattern(self) -> HybridPattern:
        """The parsed pattern, one family per layer."""
        return HybridPattern.parse(self.model["hybrid_pattern"], depth=self.model["num_layers"])

    @property
    def assumed(self) -> tuple[str, ...]:
        """Those of ``defaults`` that decide on the model: the base, and the depth."""
        return tuple(line for line in self.defaults if line.startswith(("recipe:", "num_layers:")))

    def to_mapping(self) -> dict[str, Any]:
        """Return a flat mapping that resolves to this recipe."""
        layout = dataclasses.asdict(self.layout)  # with its Nones: the base may have another degree
        training = {k: v for k, v in dataclasses.asdict(self.training).items() if v is not None}
        run = {k: getattr(self, k) for k in RUN_KEYS[1:] if getattr(self, k) is not None}
        return {"recipe": self.name, **self.model, **layout, **training, **run}


def resolve(
    source: str,
    overrides: Iterable[str] = (),
    layout: str | None = None,
    world_size: str | None = None,
) -> Recipe:
    """Resolve the recipe that a command line names.

    Args:
        source: a name of the catalogue, or the path of a YAML file.
        overrides: ``key=value`` strings; values are read as YAML.
        layout: of ``--layout``: degrees to change in the recipe's layout, ``tp=2,cp=2``.
        world_size: of ``--world-size``.

    Raises:
        UserError: unknown recipe or key (with the nearest known one), a file that cannot be read, a
            setting that is given twice or empty, or everything that is wrong with the values.
    """
    if source in CATALOG:
        settings: dict[str, Any] = {"recipe": source}
    elif source.endswith((".yaml", ".yml")) or (source and Path(source).exists()):
        settings = read_yaml(Path(source))
    else:
        raise UserError(
            f"There is no recipe {shown(source)}.{nearest(source, CATALOG)} The recipes are "
            f"{', '.join(CATALOG)}; a YAML file's name ends in .yaml."
        )
    return from_mapping(settings, read_command_line(overrides, layout, world_size))


def from_mapping(settings: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """Resolve a flat mapping of settings over its base recipe.

    Args:
        settings: of a file or a program.
        changes: of the command line, which override the file's; a degree changes the file's
            layout (:meth:`nemo_megacpp.layout.ParallelLayout.changed`).

    Raises:
        UserError: as :func:`resolve`.
    """
    names: dict[str, str] = {}
    said, changes = full_names(settings, names), full_names(changes or {}, names)
    given = {**said, **changes}
    base_name = given.pop("recipe", None)
    defaults = []
    if base_name is None:
        base_name = DEFAULT_BASE
        defaults.append(f"recipe: {base_name}")
    if str(base_name) not in CATALOG:
        raise UserError(
            f"There is no recipe {shown(base_name)} to build on."
            f"{nearest(str(base_name), CATALOG)} The recipes are {', '.join(CATALOG)}."
        )
    base, owners = CATALOG[base_name], field_owners()
    model, layout, settled = dict(base.model), base.layout, base.training
    run: dict[str, Any] = {}
    messages: list[str] = []
    for key, value in given.items():
        with collect_violations(messages):
            if owners[key] == "model":
                model[key] = _read_model_field(key, value, names[key])
            elif key == "data":
                run[key] = read_sources(value)
            elif owners[key] == "run":
                run[key] = _read_text(key, value)
    for degrees in (said, changes):
        with collect_violations(messages):
            layout = layout.changed({k: v for k, v in degrees.items() if owners[k] == "layout"})
    messages += size_violations(model)
    training = {key: value for key, value in given.items() if owners[key] == "training"}
    followed = _following(base.training, training)
    with collect_violations(messages):
        settled = read_training(base.training, {**training, **followed}, names)
    raise_violations(messages)

    load_families(model.get("family_modules"), say=_say)
    if "hybrid_pattern" in given and "num_layers" not in given:
        # The string is a unit to tile, which may end with a cut.
        unit = HybridPattern.parse(given["hybrid_pattern"].rstrip().removesuffix(CUT))
        model["num_layers"] = max(len(unit), base.model["num_layers"])
        whose = "the pattern" if len(unit) > base.model["num_layers"] else "the recipe"
        defaults.append(f"num_layers: {model['num_layers']} (depth of {whose})")
    if all(owners[key] != "layout" for key in given):
        defaults.append(f"layout: {layout.short()}")
    defaults += (f"{key}: {value} ({_FOLLOWS[key]})" for key, value in followed.items())
    for key in ("max_steps", "global_batch_size", "lr", "precision"):
        if key not in training:
            defaults.append(f"{key}: {getattr(settled, key)}")
    if run.get("data") is None:
        builtin = model["vocab_size"] <= MAX_VOCAB_SIZE
        defaults.append("data: torch's C++ headers" if builtin else "data: none, which a run needs")
    return Recipe(
        base_name,
        model,
        layout,
        settled,
        given=frozenset(given),
        defaults=tuple(defaults),
        **run,
    )


def _say(line: str) -> None:
    """Print a line on stderr, once per job."""
    if speaks_for_job():
        say(line, error=True)


def _read_model_field(key: str, value: Any, name: str) -> Any:
    """Read a field of the model; Megatron, which takes seconds to import, only for its own."""
    if key == "hybrid_pattern" and value is None:
        raise UserError("pattern is empty; give letters, for example pattern=AEMR.")
    owner: type = HybridFields
    if key not in HybridFields.__annotations__:
        from nemo_megacpp.config import ACTIVATIONS, HybridConfig

        if key == "activation_func":  # a function, which YAML cannot write
            if value not in [*ACTIVATIONS]:
                raise UserError(f"{name}: {shown(value)} is not {_either(ACTIVATIONS)}.")
            return value
        owner = HybridConfig
    return read_value(owner, key, value, name)


def _either(names: Iterable[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}"


def _read_text(key: str, value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise UserError(
            f"{key}: {shown(value)} is not a string; put it in quotes if that is its name."
        )
    return value if value is None else validate_path(key, value)


def _following(base: Training, given: Mapping[str, Any]) -> dict[str, int]:
    """Return the settings that follow from given ones; those may still be invalid."""
    found = {}
    packed = given.get("packed_documents", base.packed_documents) is True
    if packed and "micro_batch_size" not in given:
        found["micro_batch_size"] = 1
    steps = given.get("max_steps")
    if type(steps) is int and steps > 0 and "warmup_steps" not in given:
        most = steps // _WARMUP_SHARE
        found |= {"warmup_steps": most} if base.warmup_steps > most else {}
    return found
