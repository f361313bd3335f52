"""Everything that can be refused before a rank is started or a file written."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint.identity import (
    newest_checkpoint,
    read_identity,
    refuse_another_model,
)
from nemo_megacpp.data.builtin import builtin_folder
from nemo_megacpp.data.prepared import MANIFEST, PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import refuse_illegal
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.recipes.catalog import NAM56R_MODEL
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.resume import refuse_finished
from nemo_megacpp.recipes.sources import check_packing_of, check_tokenizer_of, open_blend


@dataclass(frozen=True)
class RecipeShape:
    """A recipe's sizes as the layout rules read them (:class:`nemo_megacpp.layout.ModelShape`)."""

    pattern: HybridPattern
    hidden_size: int
    num_attention_heads: int | None
    num_query_groups: int | None
    mamba_num_heads: int | None
    mamba_num_groups: int | None
    m2rnn_num_heads: int | None
    num_moe_experts: int | None
    moe_ffn_hidden_size: int | None
    moe_shared_expert_intermediate_size: int | None
    vocab_size: int
    make_vocab_size_divisible_by: int | None
    seq_length: int | None
    micro_batch_size: int | None
    global_batch_size: int | None


def shape_of(recipe: Recipe) -> RecipeShape:
    """Return what the layout rules want to know about ``recipe``."""
    from nemo_megacpp.config import HybridConfig

    defaults = {f.name: f.default for f in dataclasses.fields(HybridConfig)}
    names = [f.name for f in dataclasses.fields(RecipeShape) if f.name in defaults]
    sizes: dict[str, Any] = {name: recipe.model.get(name, defaults[name]) for name in names}
    return RecipeShape(
        pattern=recipe.pattern,
        micro_batch_size=recipe.training.micro_batch_size,
        global_batch_size=recipe.training.global_batch_size,
        **sizes,
    )


def check_layout_of(recipe: Recipe) -> None:
    """Refuse an illegal layout, every violation at once.

    Raises:
        UserError: numbered violations, each with its numbers and the nearest legal choices.
    """
    refuse_illegal(recipe.layout, shape_of(recipe))


def check_model_of(recipe: Recipe) -> None:
    """Refuse a model that cannot be configured, by Megatron's own checks where there are some.

    Raises:
        UserError: sizes below 1, more experts per token than there are, or Megatron's reason.
    """
    import torch

    from nemo_megacpp.config import HybridConfig

    model = recipe.model
    for name, value in model.items():
        if type(NAM56R_MODEL.get(name)) is int and value is not None and value < 1:
            raise UserError(f"{name}: {value} must be at least 1.")
    chosen, experts = model["moe_router_topk"], model["num_moe_experts"]
    if Family.EXPERT in recipe.pattern.families and chosen > (experts or 0):
        raise UserError(
            f"moe_router_topk={chosen} experts per token are more than num_moe_experts={experts}."
        )
    _check_low_precision(model)
    degrees = dataclasses.asdict(recipe.layout)
    del degrees["world_size"]
    bf16 = recipe.training.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        HybridConfig(**model, **degrees, bf16=bf16, params_dtype=dtype, pipeline_dtype=dtype)
    except UserError:
        raise
    except (AssertionError, ImportError, ValueError) as error:
        raise UserError(f"Megatron refuses this model: {error}") from None


def _check_low_precision(model: dict[str, Any]) -> None:
    """Megatron's configuration fails on FP8 without Transformer Engine, and does not say why."""
    if model.get("fp8") is not None:
        from nemo_megacpp.specs.backend import TorchBackend, default_backend

        if isinstance(default_backend(), TorchBackend):
            raise UserError(
                f"fp8={model['fp8']!r} needs Transformer Engine, which is not installed. "
                f"Install it, or leave fp8 out."
            )


def check_loggers_of(recipe: Recipe) -> None:
    """Refuse a logger that is not installed.

    Raises:
        UserError: with what to install.
    """
    wanted = {"wandb": recipe.training.wandb_project is not None}
    wanted["tensorboard"] = recipe.training.tensorboard
    for name, asked in wanted.items():
        if asked and importlib.util.find_spec(name) is None:
            leave = "tensorboard=false" if name == "tensorboard" else "no wandb_project"
            raise UserError(f"{name} is not installed: pip install {name}, or give {leave}.")
    if recipe.training.wandb_name is not None and recipe.training.wandb_project is None:
        raise UserError("wandb_name is given without wandb_project, which turns the logging on.")


def open_data(recipe: Recipe) -> tuple[Recipe, list[PreparedData]]:
    """Open the recipe's data; the model takes its vocabulary unless the user gave another.

    Returns:
        The recipe with the vocabulary settled, and the data: one folder, or those of the blend;
        none for a built-in corpus that is yet to be prepared.

    Raises:
        UserError: data that is missing, unreadable, damaged, too short, of another vocabulary or
            of another tokenizer than asked; a blend of several; packed documents that CP cannot
            deal.
    """
    if isinstance(recipe.data, dict):
        sources = open_blend(recipe.data)
    else:
        folder = Path(recipe.data or builtin_folder(recipe.model["vocab_size"]))
        if recipe.data is None and not (folder / MANIFEST).exists():
            check_tokenizer_of(recipe, [])
            check_packing_of(recipe, {folder: 1})
            return recipe, []
        sources = [PreparedData.open(folder)]
    check_tokenizer_of(recipe, sources)
    data = sources[0]
    if data.vocab_size != recipe.model["vocab_size"]:
        if recipe.data is None or "vocab_size" in recipe.given:
            raise UserError(
                f"{data.root} was made with a vocabulary of {data.vocab_size}, and vocab_size="
                f"{recipe.model['vocab_size']} was asked for. Leave vocab_size out, or prepare the "
                f"data with --vocab-size {recipe.model['vocab_size']}."
            )
        model = {**recipe.model, "vocab_size": data.vocab_size}
        chosen = (*recipe.defaults, f"vocab_size: {data.vocab_size} (the data's)")
        recipe = dataclasses.replace(recipe, model=model, defaults=chosen)
    for source in sources:
        for split, counts in source.splits.items():
            if counts.tokens <= recipe.model["seq_length"]:
                raise UserError(
                    f"The {split} split of {source.root} has {counts.tokens} tokens; one sample of "
                    f"seq_length={recipe.model['seq_length']} needs one more than that."
                )
    check_packing_of(recipe, {data.root: data.document_multiple for data in sources})
    return recipe, sources


def find_resume(recipe: Recipe, sources: list[PreparedData]) -> Recipe:
    """Return the recipe with ``resume`` turned into the path of a checkpoint that fits.

    Args:
        recipe: resolved.
        sources: its data, of :func:`open_data`.

    Raises:
        UserError: no such checkpoint, one of another model or tokenizer, or one that leaves no step
            to train.
    """
    if recipe.resume is None:
        return recipe
    if recipe.resume == "auto":
        if recipe.run_dir is None:
            raise UserError("resume=auto looks in run_dir; give run_dir=FOLDER as well.")
        found = newest_checkpoint(Path(recipe.run_dir) / "checkpoints")
        if found is None:
            return dataclasses.replace(recipe, resume=None)
    else:
        found = _checkpoint_at(Path(recipe.resume))
    refuse_another_model(
        found,
        recipe.model,
        recipe.pattern.letters,
        sources[0].tokenizer_fingerprint if sources else None,
    )
    identity = read_identity(found) or {}
    training = recipe.training
    refuse_finished(found, identity.get("step"), training.max_steps, training.stop_after)
    return dataclasses.replace(recipe, resume=str(found.absolute()))


def _checkpoint_at(path: Path) -> Path:
    """Accept a checkpoint, or a run folder, whose newest checkpoint is meant."""
    if (path / "weights").is_dir():
        if not (path / "weights" / ".metadata").exists():
            raise UserError(
                f"The checkpoint {path} is incomplete: its run ended while it was being saved "
                f"(weights/.metadata is missing)."
            )
        return path
    for folder in (path / "checkpoints", path):
        if (found := newest_checkpoint(folder)) is not None:
            return found
    raise UserError(
        f"There is no checkpoint at {path}: it is neither a checkpoint folder (with weights/ in "
        f"it) nor a run folder (with a complete one under checkpoints/)."
    )
