"""What becomes of each setting of a recipe at the door to Megatron-Bridge.

A setting is *carried* into the field of Bridge's configuration that is named here, *done* by this
package around Bridge's loop, or *refused* with the reason where a recipe asks for it. Fields of
the model and of the layout are carried to the provider under their own names, all of them
(:mod:`nemo_megacpp.bridge.provider`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nemo_megacpp.errors import raise_violations
from nemo_megacpp.recipes.recipe import Recipe


@dataclass(frozen=True)
class Fate:
    """What becomes of a setting.

    Attributes:
        kind: ``carried``, ``done`` or ``refused``.
        where: the field of Bridge's configuration, what does it, or the reason.
        legal: of a refused one: the values that ask for nothing.
    """

    kind: Literal["carried", "done", "refused"]
    where: str
    legal: tuple[Any, ...] = ()


def _carried(where: str) -> Fate:
    return Fate("carried", where)


def _done(where: str) -> Fate:
    return Fate("done", where)


_RECORDER = _done("RunRecorder (bridge/callbacks.py)")
_STARTER = _done("start.py, before the ranks start")
_SAVER = _done("HybridCheckpointManager (bridge/checkpointing.py)")

FATES: dict[str, Fate] = {
    "micro_batch_size": _carried("train.micro_batch_size"),
    "global_batch_size": _carried("train.global_batch_size"),
    "packed_documents": _carried("dataset.packed_documents"),
    "max_steps": _carried("train.train_iters and scheduler.lr_decay_iters"),
    "stop_after": _carried("train.exit_interval"),
    "seed": _carried("rng.seed and dataset.seed"),
    "lr": _carried("optimizer.lr"),
    "min_lr": _carried("optimizer.min_lr"),
    "warmup_steps": _carried("scheduler.lr_warmup_iters"),
    "lr_warmup_init": _carried("scheduler.lr_warmup_init"),
    "lr_decay_style": _carried("scheduler.lr_decay_style"),
    "lr_wsd_decay_steps": _carried("scheduler.lr_wsd_decay_iters"),
    "lr_wsd_decay_style": _carried("scheduler.lr_wsd_decay_style"),
    "weight_decay": _carried("optimizer.weight_decay, scheduler.start_ and end_weight_decay"),
    "adam_beta1": _carried("optimizer.adam_beta1"),
    "adam_beta2": _carried("optimizer.adam_beta2"),
    "adam_eps": _carried("optimizer.adam_eps"),
    "clip_grad": _carried("optimizer.clip_grad"),
    "use_distributed_optimizer": _carried("use_distributed_optimizer of optimizer and ddp"),
    "overlap_grad_reduce": _carried("ddp.overlap_grad_reduce"),
    "overlap_param_gather": _carried("overlap_param_gather of optimizer and ddp"),
    "precision": _carried("mixed_precision, or float32 in the provider and the optimizer"),
    "val_check_interval": _carried("validation.eval_interval"),
    "limit_val_batches": _carried("validation.eval_iters"),
    "log_interval": _RECORDER,
    "tensorboard": _carried("logger.tensorboard_dir"),
    "wandb_project": _carried("logger.wandb_project"),
    "wandb_name": _carried("logger.wandb_exp_name"),
    "use_pytorch_profiler": Fate(
        "refused", "Bridge's profiler writes other files than the run's profile folder", (False,)
    ),
    "profile_step_start": _done("nothing without use_pytorch_profiler, which is refused"),
    "profile_step_end": _done("nothing without use_pytorch_profiler, which is refused"),
    "profile_ranks": _done("nothing without use_pytorch_profiler, which is refused"),
    "save_interval": _carried("checkpoint.save_interval"),
    "async_save": Fate(
        "refused",
        "a checkpoint is complete with its manifest, which is written at once here",
        (False,),
    ),
    "keep_latest": _SAVER,
    "keep_every": _SAVER,
    "verify_checkpoint": _STARTER,
    "damaged_checkpoint": _STARTER,
    "init_side_channels": _SAVER,
    "heartbeat_timeout_minutes": _done("Heartbeats (bridge/callbacks.py)"),
    "init_timeout_minutes": _done("Heartbeats (bridge/callbacks.py)"),
    "recipe": _STARTER,
    "data": _carried("dataset.sources"),
    "tokenizer": _STARTER,
    "run_dir": _carried("checkpoint.save"),
    "resume": _carried("checkpoint.load"),
    "init_from": _carried("checkpoint.pretrained_checkpoint"),
}
"""Setting of a recipe -> what becomes of it."""


def validate_carried(recipe: Recipe) -> None:
    """Refuse what a recipe asks for and Bridge's door does not do.

    Raises:
        UserError: naming every such setting.
    """
    raise_violations(_violations(recipe))


def _violations(recipe: Recipe) -> Iterator[str]:
    for name, fate in FATES.items():
        value = getattr(recipe.training, name, None)
        if fate.kind == "refused" and value not in fate.legal:
            legal = ", ".join(map(str, fate.legal))
            yield f"{name}={value} through bridge: {fate.where}. Legal: {legal}."
    stages = recipe.layout.virtual_pipeline_model_parallel_size
    carries = recipe.model.get("m2rnn_depth_state") and recipe.pattern.letters.count("R") > 1
    if stages is not None and carries:
        yield (
            f"m2rnn_depth_state=true with virtual_pipeline_model_parallel_size={stages} through "
            f"bridge: Bridge calls Megatron's schedule with the model's seq_length, and a message "
            f"between virtual stages that carries the state is longer. Leave out the virtual "
            f"stages, or train through NeMo."
        )
