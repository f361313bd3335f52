"""A recipe as the argument vector of Megatron-LM's ``pretrain_mamba.py`` or ``pretrain_hybrid.py``.

Every setting of the recipe has an option or is part of the spec's name
(:mod:`nemo_megacpp.specs.named`); a recipe with another setting is refused. None is dropped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import find_checkpoint
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.core.checkpoints import newest_iteration
from nemo_megacpp.data.prepared import PreparedData, weighted_prefixes
from nemo_megacpp.errors import UserError
from nemo_megacpp.megatron_args.dialect import Dialect
from nemo_megacpp.megatron_args.model_options import model_options
from nemo_megacpp.pattern import Family
from nemo_megacpp.preflight.model_checks import validate_model, validate_recipe_layout
from nemo_megacpp.preflight.outputs import validate_loggers, validate_profile
from nemo_megacpp.preflight.recipe_data import open_data
from nemo_megacpp.preflight.start_weights import validate_start_weights
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.training import Training

Device = Literal["cuda", "cpu"]

_TRAINING_OPTIONS = {
    "max_steps": ("--train-iters", "--lr-decay-iters"),
    "stop_after": ("--exit-interval",),
    "micro_batch_size": ("--micro-batch-size",),
    "global_batch_size": ("--global-batch-size",),
    "lr": ("--lr",),
    "min_lr": ("--min-lr",),
    "lr_decay_style": ("--lr-decay-style",),
    "lr_wsd_decay_steps": ("--lr-wsd-decay-iters",),
    "warmup_steps": ("--lr-warmup-iters",),
    "weight_decay": ("--weight-decay",),
    "clip_grad": ("--clip-grad",),
    "adam_beta1": ("--adam-beta1",),
    "adam_beta2": ("--adam-beta2",),
    "adam_eps": ("--adam-eps",),
    "val_check_interval": ("--eval-interval",),
    "limit_val_batches": ("--eval-iters",),
    "save_interval": ("--save-interval",),
    "log_interval": ("--log-interval",),
    "seed": ("--seed",),
}
_PROFILE_OPTIONS = ("profile_step_start", "profile_step_end", "profile_ranks")
_OTHER_TRAINING = frozenset(
    (
        *("precision", "lr_warmup_init", "lr_wsd_decay_style"),
        *("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
        *("tensorboard", "wandb_project", "wandb_name", "use_pytorch_profiler"),
        *_PROFILE_OPTIONS,
    )
)
"""They are written in another form."""
_CHECKPOINT_VERSION = 3.0
"""That Megatron's scripts save since 2021; an older one has another order of attention's rows."""


def megatron_arguments(
    recipe: Recipe, dialect: Dialect, run_dir: str, device: Device
) -> tuple[list[str], list[str]]:
    """Return the argument vector of ``recipe``, and remarks for the user.

    Args:
        recipe: resolved; its layout and model are validated here.
        dialect: of the Megatron-LM that will read the arguments.
        run_dir: where the run writes; checkpoints go to ``checkpoints`` in it.
        device: what the run computes on.

    Raises:
        UserError: an illegal layout, unusable data, or all settings that the script has no option
            for.
    """
    validate_recipe_layout(recipe)
    validate_loggers(recipe)
    validate_profile(recipe)
    validate_model(recipe, device)
    recipe, sources = open_data(recipe)
    config = validate_model(recipe, device)
    model, unsaid = model_options(config, dialect)
    refusals = [*unsaid, *_refusals(recipe, config, dialect, device)]
    if refusals:
        listed = "\n".join(f"  {refusal}" for refusal in refusals)
        raise UserError(f"{dialect.script} has no option for this of {recipe.name}:\n{listed}")
    if recipe.init_from is not None:
        validate_start_weights(find_checkpoint(Path(recipe.init_from)), recipe)
    folder = Path(run_dir).absolute()
    words = [*model, *_data(recipe, sources, folder), *_training(recipe.training)]
    words += _outputs(recipe, folder)
    if device == "cpu":
        words += ["--transformer-impl", "local", "--distributed-backend", "gloo"]
    chosen = [*recipe.assumed, *(x for x in recipe.defaults if x.startswith("warmup_steps:"))]
    remarks = [f"defaults taken: {'; '.join(chosen)}"] if chosen else []
    remarks.append(f"layout: {recipe.layout.describe()}")
    if not sources:
        remarks.append("no data=FOLDER in the recipe: mock data")
    if Family.RECURRENT in config.pattern.all_families:
        as_what = "count R blocks as M" if dialect.reads_the_pattern else "leave out the R blocks"
        remarks.append(f"the script's TFLOP/s {as_what}")
    return words, remarks


def _refusals(recipe: Recipe, config: HybridConfig, dialect: Dialect, device: Device) -> list[str]:
    """Return what the script has no option for, one phrase each."""
    found = []
    training = recipe.training
    if recipe.resume not in (None, "auto"):
        found.append(
            f"resume={recipe.resume}: the script resumes only checkpoints of its own format; "
            f"resume=auto takes the newest in run_dir/checkpoints, into which `checkpoint export "
            f"--to megatron` can write one of a run"
        )
    if recipe.resume == "auto" and training.use_distributed_optimizer and device == "cpu":
        found.append(
            "resume=auto with use_distributed_optimizer=true on a CPU: Megatron loads that state "
            "only with Transformer Engine or Apex; use use_distributed_optimizer=false"
        )
    if recipe.init_from is not None and (reason := _unreadable(Path(recipe.init_from))):
        found.append(f"init_from={recipe.init_from}: {reason}")
    if recipe.layout.vpp is not None and not dialect.reads_the_pattern:
        found.append(
            f"virtual_pipeline_model_parallel_size={recipe.layout.vpp}: the script builds every "
            f"virtual stage like the first one"
        )
    if config.mtp_num_layers and recipe.layout.cp > 1:
        found.append(
            f"prediction depths with context_parallel_size={recipe.layout.cp}: the script's model "
            f"averages their losses over each context-parallel rank's own tokens"
        )
    counted = config.moe_z_loss_coeff or config.moe_router_load_balancing_type != "none"
    if Family.EXPERT in config.pattern.families and counted:
        stages = config.pattern.chunks(recipe.layout.pp)
        for stage, layers in enumerate(stages):
            if all(config.pattern.families[layer] is not Family.EXPERT for layer in layers):
                found.append(
                    f"pipeline stage {stage} of {len(stages)} without an E block: the script's log "
                    f"of auxiliary losses would sum tensors of unequal sizes"
                )
    if training.use_pytorch_profiler and not training.tensorboard:
        found.append("use_pytorch_profiler with tensorboard=false: its traces go to that folder")
    known = {*_TRAINING_OPTIONS, *_OTHER_TRAINING}
    return found + [
        f"{field.name}={getattr(training, field.name)!r}"
        for field in dataclasses.fields(Training)
        if field.name not in known and getattr(training, field.name) != field.default
    ]


def _unreadable(init_from: Path) -> str:
    """Return why the script cannot start from the weights of a checkpoint; empty if it can."""
    content = CheckpointContent(init_from)
    version = content.common().get("checkpoint_version")
    # Without it the script takes the file for an old one, and reorders the rows of linear_qkv.
    if content.prefix or not isinstance(version, float) or version < _CHECKPOINT_VERSION:
        return (
            "the script loads only checkpoints that a script saved, or that `checkpoint export "
            "--to megatron` wrote; train starts from any"
        )
    if newest_iteration(content.directory.parent) != content.directory:
        return f"the script loads the newest checkpoint of {content.directory.parent} only"
    return ""


def _data(recipe: Recipe, sources: list[PreparedData], run_dir: Path) -> list[str]:
    # The stack's attention is causal by its mask type.
    words = ["--no-create-attention-mask-in-dataloader"]
    if not sources:
        # The null tokenizer adds an end-of-document token to the vocabulary that it is given.
        return [
            *words,
            "--mock-data",
            *("--tokenizer-type", "NullTokenizer"),
            *("--vocab-size", str(recipe.model["vocab_size"] - 1)),
        ]
    weights = list(recipe.data.values()) if isinstance(recipe.data, dict) else [None]
    train = weighted_prefixes([data.train_prefix for data in sources], weights)
    heldout = weighted_prefixes([data.heldout_prefix for data in sources], weights)
    return [
        *words,
        *("--train-data-path", *train),
        *("--valid-data-path", *heldout),
        *("--test-data-path", *heldout),
        # The script unpickles the index that it finds: not beside the data, which may be foreign.
        *("--data-cache-path", str(run_dir / "index")),
        *("--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(sources[0].tokenizer_dir.absolute())),
    ]


def _outputs(recipe: Recipe, run_dir: Path) -> list[str]:
    """Return where the run writes and what it resumes, with the schedule of these settings."""
    training, checkpoints = recipe.training, str(run_dir / "checkpoints")
    words = ["--save", checkpoints]
    if recipe.resume == "auto":
        words += ["--load", checkpoints, "--override-opt_param-scheduler"]
    if recipe.init_from is not None:  # unless there is a checkpoint to resume
        folder = find_checkpoint(Path(recipe.init_from)).absolute().parent
        words += ["--pretrained-checkpoint", str(folder)]
    if training.tensorboard:
        words += ["--tensorboard-dir", str(run_dir / "tensorboard")]
    if training.wandb_project is not None:
        words += ["--wandb-project", training.wandb_project]
        words += ["--wandb-exp-name", training.wandb_name or run_dir.name]
    return words


def _training(training: Training) -> list[str]:
    words: list[str] = []
    for name, names in _TRAINING_OPTIONS.items():
        value = getattr(training, name)
        if value is not None:
            words += [word for option in names for word in (option, str(value))]
    if training.warmup_steps:
        words += ["--lr-warmup-init", str(training.first_lr)]
    if training.lr_decay_style == "WSD":
        words += ["--lr-wsd-decay-style", training.lr_wsd_decay_style]
    if training.use_pytorch_profiler:
        words += ["--profile", "--use-pytorch-profiler"]
        for name in _PROFILE_OPTIONS:
            value = getattr(training, name)
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    if training.use_distributed_optimizer:
        words.append("--use-distributed-optimizer")
    if training.overlap_grad_reduce:
        words.append("--overlap-grad-reduce")
    if training.gathers_in_forward:
        words.append("--overlap-param-gather")
    return words
