"""From a recipe's name, a YAML file and ``key=value`` overrides to one resolved recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_megacpp.data.builtin import MAX_VOCAB_SIZE
from nemo_megacpp.errors import UserError, nearest
from nemo_megacpp.families import load_families
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import CUT, HybridPattern
from nemo_megacpp.recipes.catalog import CATALOG, Training
from nemo_megacpp.recipes.given import read_command_line, read_yaml
from nemo_megacpp.recipes.names import RUN_KEYS, field_owners, full_names
from nemo_megacpp.recipes.sources import Sources, read_sources
from nemo_megacpp.values import read_value

DEFAULT_BASE = "nam56r_tiny"
"""The base of a YAML file that names none."""

_WARMUP_SHARE = 5
"""A recipe's warm-up takes at most this share of a run whose max_steps the user gave: 1/5."""
_LARGEST_SEED = 2**31 - 1
"""NumPy takes 32 bits, and NeMo adds a hundred for each pipeline stage."""


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
        tokenizer: folder of the tokenizer that the data must have been made with; None for the
            data's own.
        run_dir: where the run writes; None for a new folder under ``runs/``.
        resume: checkpoint to resume, or ``auto`` for the newest in ``run_dir``.
        init_from: checkpoint whose weights a new run starts from, at step 0.
        given: the full names of the settings that the user gave.
        defaults: what was chosen for the user, one phrase each.
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
        """What of ``defaults`` decides which model it is: the base, and the depth."""
        return tuple(line for line in self.defaults if line.startswith(("recipe:", "num_layers:")))

    def to_mapping(self) -> dict[str, Any]:
        """Return the recipe as a flat mapping that resolves to it again."""
        layout = dataclasses.asdict(self.layout)  # with its Nones: the base may have a degree there
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
        layout: of ``--layout``: degrees to lay over the recipe's layout, ``tp=2,cp=2``.
        world_size: of ``--world-size``.

    Raises:
        UserError: unknown recipe or key (with the nearest known one), a file that cannot be read, a
            setting that is given twice or empty, a value of the wrong type.
    """
    if source in CATALOG:
        settings: dict[str, Any] = {"recipe": source}
    elif source.endswith((".yaml", ".yml")) or (source and Path(source).exists()):
        settings = read_yaml(Path(source))
    else:
        raise UserError(
            f"There is no recipe {source!r}.{nearest(source, CATALOG)} The recipes are "
            f"{', '.join(CATALOG)}; a YAML file's name ends in .yaml."
        )
    return from_mapping(settings, read_command_line(overrides, layout, world_size))


def from_mapping(settings: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """Resolve a flat mapping of settings over its base recipe.

    Args:
        settings: of a file or a program.
        changes: of the command line: these settings instead of the file's; degrees are laid over
            the file's layout (:meth:`nemo_megacpp.layout.ParallelLayout.changed`).

    Raises:
        UserError: as :func:`resolve`.
    """
    from nemo_megacpp.config import HybridConfig

    said, changes = full_names(settings), full_names(changes or {})
    given = {**said, **changes}
    base_name = given.pop("recipe", None)
    defaults = []
    if base_name is None:
        base_name = DEFAULT_BASE
        defaults.append(f"recipe: {base_name}")
    if str(base_name) not in CATALOG:
        raise UserError(
            f"There is no recipe {base_name!r} to build on.{nearest(str(base_name), CATALOG)} The "
            f"recipes are {', '.join(CATALOG)}."
        )
    base = CATALOG[base_name]
    owners = field_owners()
    model, training = dict(base.model), {}
    run: dict[str, Any] = {}
    for key, value in given.items():
        owner = owners[key]
        if owner == "layout":
            continue
        if owner == "training":
            training[key] = read_value(Training, key, value)
        elif key == "data":
            run[key] = read_sources(value)
        elif owner == "run":
            if not isinstance(value, str | None):
                raise UserError(
                    f"{key}: {value!r} is not a string; put it in quotes if that is its name."
                )
            run[key] = value
        else:
            model[key] = read_value(HybridConfig, key, value)
    load_families(model.get("family_modules"))
    if "hybrid_pattern" in given and "num_layers" not in given:
        # The text is a unit here, and a unit may end with a cut.
        unit = HybridPattern.parse(given["hybrid_pattern"].rstrip().removesuffix(CUT))
        model["num_layers"] = max(len(unit), base.model["num_layers"])
        whose = "the pattern" if len(unit) > base.model["num_layers"] else "the recipe"
        defaults.append(f"num_layers: {model['num_layers']} (depth of {whose})")
    layout = base.layout
    for degrees in (said, changes):
        layout = layout.changed({k: v for k, v in degrees.items() if owners[k] == "layout"})
    if all(owners[key] != "layout" for key in given):
        defaults.append(f"layout: {layout.short()}")
    settled = dataclasses.replace(base.training, **training)
    if settled.packed_documents and "micro_batch_size" not in training:
        settled = dataclasses.replace(settled, micro_batch_size=1)
        defaults.append("micro_batch_size: 1 (a row is a pack of documents)")
    most = settled.max_steps // _WARMUP_SHARE
    if "max_steps" in training and "warmup_steps" not in training and settled.warmup_steps > most:
        settled = dataclasses.replace(settled, warmup_steps=most)
        defaults.append(f"warmup_steps: {most} (max_steps / {_WARMUP_SHARE})")
    for key in ("max_steps", "global_batch_size", "lr", "precision"):
        if key not in training:
            defaults.append(f"{key}: {getattr(settled, key)}")
    if run.get("data") is None:
        builtin = model["vocab_size"] <= MAX_VOCAB_SIZE
        defaults.append("data: torch's C++ headers" if builtin else "data: none, which a run needs")
    _check_training(settled)
    return Recipe(
        base_name,
        model,
        layout,
        settled,
        given=frozenset(given),
        defaults=tuple(defaults),
        **run,
    )


def _check_training(training: Training) -> None:
    at_least: dict[str, int] = {
        **dict.fromkeys(
            (
                "max_steps",
                "stop_after",
                "micro_batch_size",
                "global_batch_size",
                "val_check_interval",
                "limit_val_batches",
                "save_interval",
                "keep_last",
                "keep_every",
                "log_interval",
            ),
            1,
        ),
        **dict.fromkeys(("warmup_steps", "weight_decay", "clip_grad", "min_lr", "seed"), 0),
    }
    for name, least in at_least.items():
        value = getattr(training, name)
        if value is not None and value < least:
            raise UserError(f"{name}: {value} must be at least {least}.")
    if training.seed > _LARGEST_SEED:
        raise UserError(f"seed: {training.seed} must be at most {_LARGEST_SEED}.")
    if training.stop_after is not None and training.stop_after > training.max_steps:
        raise UserError(
            f"stop_after: {training.stop_after} is past the end of the run, max_steps="
            f"{training.max_steps}."
        )
    if training.warmup_steps >= training.max_steps:
        raise UserError(
            f"warmup_steps: {training.warmup_steps} is not below max_steps={training.max_steps}: "
            f"the learning rate would rise to the end of the run and never decay. Give a smaller "
            f"warmup_steps."
        )
    if training.keep_every is not None:
        if training.keep_last is None:
            raise UserError(
                f"keep_every: {training.keep_every} says what keep_last does not remove; give "
                f"keep_last too, or neither: then all checkpoints are kept."
            )
        if training.keep_every % training.save_interval:
            raise UserError(
                f"keep_every: {training.keep_every} is not a multiple of save_interval="
                f"{training.save_interval}, so it would not name the checkpoints that are made."
            )
    if training.packed_documents and training.micro_batch_size != 1:
        raise UserError(
            f"packed_documents: a microbatch of packed documents is one row, and micro_batch_size="
            f"{training.micro_batch_size} was asked for. Leave it out, or set it to 1; "
            f"global_batch_size may stay."
        )
    if training.precision not in ("fp32", "bf16"):
        raise UserError(f"precision: {training.precision!r} is neither 'fp32' nor 'bf16'.")
    if training.lr <= 0:
        raise UserError(f"lr: {training.lr} must be positive.")
    if training.min_lr > training.lr:
        raise UserError(
            f"min_lr: {training.min_lr} is above lr={training.lr}, from which the learning rate "
            f"falls to it. Give both."
        )
    if not 0 <= training.adam_beta2 < 1:
        raise UserError(f"adam_beta2: {training.adam_beta2} must be at least 0 and below 1.")
