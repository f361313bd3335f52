"""From a recipe's name, a YAML file and ``key=value`` overrides to one resolved recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_megacpp.errors import UserError, nearest
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.parallel import FIELD_OF
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.recipes.catalog import CATALOG, Training

DEFAULT_BASE = "nam56r_tiny"
"""The base of a YAML file that names none."""

_RUN_KEYS = ("recipe", "data", "run_dir", "resume")
_MODEL_ALIASES = {"pattern": "hybrid_pattern", "depth": "num_layers"}
_TRAINING_ALIASES = {
    "learning_rate": "lr",
    "steps": "max_steps",
    "train_iters": "max_steps",
    "eval_interval": "val_check_interval",
    "eval_iters": "limit_val_batches",
}


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        name: of the base in the catalogue.
        model: fields of :class:`nemo_megacpp.config.HybridConfig`.
        layout: the parallel layout.
        training: the run's settings.
        data: folder written by ``nemo-megacpp data prepare``; None for the built-in corpus.
        run_dir: where the run writes; None for a new folder under ``runs/``.
        resume: checkpoint to go on from, or ``auto`` for the newest in ``run_dir``.
        given: the full names of the settings that the user gave.
        defaults: what was chosen for the user, one phrase each.
    """

    name: str
    model: dict[str, Any]
    layout: ParallelLayout
    training: Training
    data: str | None = None
    run_dir: str | None = None
    resume: str | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)
    defaults: tuple[str, ...] = field(default=(), compare=False)

    @property
    def pattern(self) -> HybridPattern:
        """The parsed pattern, one family per layer."""
        return HybridPattern.parse(self.model["hybrid_pattern"], depth=self.model["num_layers"])

    def to_mapping(self) -> dict[str, Any]:
        """Return the recipe as a flat mapping that resolves to it again."""
        layout = {
            f.name: getattr(self.layout, f.name)
            for f in dataclasses.fields(self.layout)
            if getattr(self.layout, f.name) is not None
        }
        training = {k: v for k, v in dataclasses.asdict(self.training).items() if v is not None}
        run = {k: getattr(self, k) for k in _RUN_KEYS[1:] if getattr(self, k) is not None}
        return {"recipe": self.name, **self.model, **layout, **training, **run}


def resolve(source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Resolve the recipe that a command line names.

    Args:
        source: a name of the catalogue, or the path of a YAML file.
        overrides: ``key=value`` strings; values are read as YAML.

    Raises:
        UserError: unknown recipe or key (with the nearest known one), a file that cannot be read, a
            value of the wrong type.
    """
    if source in CATALOG:
        settings: dict[str, Any] = {"recipe": source}
    elif source.endswith((".yaml", ".yml")) or Path(source).exists():
        settings = _read_yaml(Path(source))
    else:
        raise UserError(
            f"There is no recipe {source!r}.{nearest(source, CATALOG)} The recipes are "
            f"{', '.join(CATALOG)}; a YAML file's name ends in .yaml."
        )
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r} is not an override: write key=value.")
        try:
            settings[_canonical(key.strip())] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: cannot read {value!r} as a YAML value: {error}") from None
    return from_mapping(settings)


def from_mapping(settings: Mapping[str, Any]) -> Recipe:
    """Resolve a flat mapping of settings over its base recipe; see :func:`resolve`."""
    given = _canonical_keys(settings)
    base_name = given.pop("recipe", None)
    defaults = []
    if base_name is None:
        base_name = DEFAULT_BASE
        defaults.append(f"recipe: {base_name}")
    if base_name not in CATALOG:
        raise UserError(
            f"There is no recipe {base_name!r} to build on.{nearest(str(base_name), CATALOG)} The "
            f"recipes are {', '.join(CATALOG)}."
        )
    base = CATALOG[base_name]
    fields = _field_owners()
    model, layout, training, run = dict(base.model), {}, {}, {}
    for key, value in given.items():
        owner = fields[key]
        if owner == "layout":
            layout[key] = value
        elif owner == "training":
            training[key] = _typed(Training, key, value)
        elif owner == "run":
            run[key] = None if value is None else str(value)
        else:
            model[key] = value
    if "hybrid_pattern" in given and "num_layers" not in given:
        unit = HybridPattern.parse(str(given["hybrid_pattern"]))
        model["num_layers"] = max(len(unit), base.model["num_layers"])
        defaults.append(f"num_layers: {model['num_layers']} (depth of the recipe)")
    if not layout:
        defaults.append(f"layout: {base.layout.short()}")
    resolved_layout = _over_base(layout, base.layout)
    settled = dataclasses.replace(base.training, **training)
    for key in ("max_steps", "global_batch_size", "lr", "precision"):
        if key not in training:
            defaults.append(f"{key}: {getattr(settled, key)}")
    if "data" not in run:
        defaults.append("data: torch's C++ headers")
    _check_training(settled)
    return Recipe(
        base_name,
        model,
        resolved_layout,
        settled,
        given=frozenset(given),
        defaults=tuple(defaults),
        **run,
    )


def _over_base(given: Mapping[str, Any], base: ParallelLayout) -> ParallelLayout:
    """Return the base's layout with the given degrees in it; SP follows TP unless it is given."""
    degrees = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    if "tensor_model_parallel_size" in given:
        del degrees["sequence_parallel"]
    return ParallelLayout.from_mapping({**degrees, **given})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold key: value lines; it holds {type(settings).__name__}.")
    return _canonical_keys(settings)


def _canonical_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for key, value in settings.items():
        name = _canonical(str(key))
        if name in given:
            raise UserError(f"{name} is given twice (once as {key!r}).")
        given[name] = value
    return given


def _canonical(key: str) -> str:
    """Return the full field name for a key or one of its short names."""
    key = _MODEL_ALIASES.get(key, _TRAINING_ALIASES.get(key, key))
    if key.lower() in FIELD_OF:
        return FIELD_OF[key.lower()]
    owners = _field_owners()
    if key not in owners:
        known = [*owners, *_MODEL_ALIASES, *_TRAINING_ALIASES, "tensor_parallel"]
        raise UserError(f"There is no setting {key!r}.{nearest(key, known)}")
    return key


def _field_owners() -> dict[str, str]:
    """Map every field name to the part of a recipe that it belongs to."""
    from nemo_megacpp.config import HybridConfig

    owners = {f.name: "model" for f in dataclasses.fields(HybridConfig) if f.init}
    owners |= dict.fromkeys(_RUN_KEYS, "run")
    owners |= {f.name: "training" for f in dataclasses.fields(Training)}
    owners |= {f.name: "layout" for f in dataclasses.fields(ParallelLayout)}
    return owners


def _typed(owner: type, key: str, value: Any) -> Any:
    """Return ``value`` as the field's type, or refuse it."""
    hint = typing.get_type_hints(owner)[key]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    accepted = (int, float) if wanted is float else (wanted,)
    if isinstance(value, str) and wanted is float:  # YAML 1.1 reads 4e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f"{key}: {value!r} is not a {wanted.__name__}.")
    return wanted(value)


def _check_training(training: Training) -> None:
    positive = (
        "max_steps",
        "micro_batch_size",
        "global_batch_size",
        "val_check_interval",
        "limit_val_batches",
        "save_interval",
        "log_interval",
    )
    for name in positive:
        if getattr(training, name) <= 0:
            raise UserError(f"{name}: {getattr(training, name)} must be at least 1.")
    if training.precision not in ("fp32", "bf16"):
        raise UserError(f"precision: {training.precision!r} is neither 'fp32' nor 'bf16'.")
    if training.lr <= 0:
        raise UserError(f"lr: {training.lr} must be positive.")
