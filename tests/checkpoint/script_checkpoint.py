"""Checkpoints as other programs save and load them: Megatron's training script
(``generate_state_dict`` and ``load_checkpoint`` in its ``training/checkpointing.py``,
core_v0.16.1), and runs through NeMo and Megatron-Bridge (:mod:`nemo_megacpp.bridge.checkpointing`).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_megacpp.checkpoint.content import CONSUMED
from nemo_megacpp.checkpoint.dcp import save_sharded, sharding_metadata
from nemo_megacpp.checkpoint.lifecycle import finish_checkpoint
from nemo_megacpp.checkpoint.optimizer_state import content_metadata, training_sharded_state_dict
from nemo_megacpp.checkpoint.random_state import random_state, sharded_random_state
from nemo_megacpp.checkpoint.training_state import load_training_state
from nemo_megacpp.checkpoint.weights import WRAPPER, replace_prefix
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.step_spec import StepSpec
from tests.bare import Trainee, prepare


def save_as_script(
    run: str, out: str, model: dict[str, Any], degrees: str, step: int, samples: int
) -> None:
    """Load a checkpoint of a run and save it in the folder ``out``; on every rank of a layout."""
    layout = ParallelLayout.parse(degrees)
    trainee = prepare(StepSpec(model, dtype="float32"), layout)
    load_training_state(trainee.chunks, trainee.optimizer, run)
    save_trainee(trainee, out, step, samples)


def save_as_bridge(
    run: str,
    out: str,
    model: dict[str, Any],
    degrees: str,
    step: int,
    samples: int,
    schedule: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Load a checkpoint of a run and save it as ``out``, with what it says of its model, and with
    the settings ``schedule`` of its parameter groups."""
    layout = ParallelLayout.parse(degrees)
    trainee = prepare(StepSpec(model, dtype="float32"), layout)
    load_training_state(trainee.chunks, trainee.optimizer, run)
    for group in trainee.optimizer.param_groups:
        group.update(schedule)
    state = training_sharded_state_dict(trainee.chunks, trainee.optimizer)
    state["random_state"] = sharded_random_state(random_state())
    state[CONSUMED] = samples
    save_sharded(state, out, content_metadata(False))
    if torch.distributed.get_rank() == 0:
        identity = {"model": model, "layout": layout.short(), "tokenizer": None}
        finish_checkpoint(Path(out), identity, step)
    torch.distributed.barrier()


def save_trainee(trainee: Trainee, out: str, step: int, samples: int) -> None:
    """Save what is trained on these ranks, one chunk each, in the folder ``out``."""
    form = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    args = Namespace(consumed_train_samples=samples)
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": step}
    (chunk,) = trainee.chunks
    state["model"] = chunk.sharded_state_dict(metadata=sharding_metadata())  # type: ignore[operator]
    state["optimizer"] = trainee.optimizer.sharded_state_dict(
        state, metadata={**form, **sharding_metadata()}
    )
    state["opt_param_scheduler"] = {"num_steps": samples}
    folder = Path(out) / f"iter_{step:07d}"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (Path(out) / "latest_checkpointed_iteration.txt").write_text(str(step))
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=form)
    torch.distributed.barrier()


def save_as_nemo(trainee: Trainee, out: str, layout: str, schedule: dict[str, Any]) -> None:
    """Save what is trained on these ranks as a run through NeMo does.

    Args:
        trainee: after some steps.
        out: the checkpoint's folder.
        layout: of these ranks.
        schedule: state of the run's scheduler, which counts steps.
    """
    step = schedule["num_steps"]
    state = training_sharded_state_dict(trainee.chunks, trainee.optimizer)
    replace_prefix(state, "", WRAPPER)
    state["optimizer"] = [state["optimizer"]]
    state["lr_schedulers"] = [schedule]
    state["HybridDataModule"] = {"consumed_samples": step * trainee.spec.global_batch_size}
    state["random_state"] = sharded_random_state(random_state())
    sharded = trainee.spec.use_distributed_optimizer
    save_sharded(state, Path(out) / "weights", content_metadata(sharded))
    if torch.distributed.get_rank() == 0:
        identity = {"model": trainee.spec.model, "layout": layout, "tokenizer": None}
        finish_checkpoint(Path(out), identity, step)
    torch.distributed.barrier()


def load_as_script(trainee: Trainee, folder: str, scheduler: OptimizerParamScheduler) -> Namespace:
    """Load a checkpoint into what is trained on these ranks, one chunk each, and ``scheduler``.

    Returns:
        The arguments in it.
    """
    common = dist_checkpointing.load_common_state_dict(folder)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    metadata |= sharding_metadata()
    (chunk,) = trainee.chunks
    state: dict[str, Any] = {"model": chunk.sharded_state_dict(metadata=metadata)}  # type: ignore[operator]
    state["optimizer"] = trainee.optimizer.sharded_state_dict(
        state, metadata=metadata, is_loading=True
    )
    state = dist_checkpointing.load(state, folder)
    assert state["checkpoint_version"] == 3.0  # another one has another order of attention's rows
    chunk.load_state_dict(state["model"], strict=True)
    trainee.optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    return state["args"]
