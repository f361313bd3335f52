"""A resolved recipe as the NeMo-Run configuration of ``llm.pretrain``."""

from __future__ import annotations

from pathlib import Path

import nemo_run as run
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from nemo_megacpp.checkpoint.folder import find_weights
from nemo_megacpp.nemo.callbacks import RunFolderWandbLogger, RunRecorder
from nemo_megacpp.nemo.checkpointing import HybridCheckpoint
from nemo_megacpp.nemo.data_module import HybridDataModule
from nemo_megacpp.nemo.heartbeats import Heartbeats
from nemo_megacpp.nemo.hybrid_gpt import HybridGPTModel, HybridModelConfig
from nemo_megacpp.nemo.hybrid_optimizer import HybridOptimizer
from nemo_megacpp.nemo.lr_schedule import MegatronScheduler
from nemo_megacpp.nemo.profiler import StepProfiler
from nemo_megacpp.nemo.run_logger import RunLogger
from nemo_megacpp.nemo.stops import StopEarly, StopOnNonFinite
from nemo_megacpp.nemo.strategy import HybridStrategy
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import dtype_of, model_settings
from nemo_megacpp.runs.initial_weights import initial_weights
from nemo_megacpp.runs.run_folder import PROFILE_FOLDER
from nemo_megacpp.runtime.host import current_host


def to_pretrain(recipe: Recipe, run_dir: Path, *, devices: int, num_nodes: int = 1) -> run.Partial:
    """Return ``run.Partial(llm.pretrain, …)`` for ``recipe``.

    Args:
        recipe: what to train; ``resume`` and ``init_from``, if given, are paths of checkpoints.
        run_dir: where checkpoints, TensorBoard files and metrics go.
        devices: ranks per node.
        num_nodes: nodes.
    """
    training, device = recipe.training, current_host().device
    model = run.Config(HybridModelConfig, **model_settings(recipe, device))
    return run.Partial(
        llm.pretrain,
        model=run.Config(HybridGPTModel, config=model),
        data=_data_module(recipe),
        trainer=run.Config(
            nl.Trainer,
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=devices,
            num_nodes=num_nodes,
            max_steps=training.max_steps,
            val_check_interval=training.val_check_interval,
            limit_val_batches=training.limit_val_batches,
            limit_test_batches=training.limit_val_batches,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=_precision() if training.precision == "bf16" else None,
            callbacks=_callbacks(recipe, run_dir),
            strategy=_strategy(recipe),
        ),
        log=_logger(recipe, run_dir),
        resume=run.Config(
            nl.AutoResume,
            resume_from_path=recipe.resume,
            restore_config=_initial_weights(recipe, run_dir),
            resume_if_exists=False,
        ),
        optim=_optimizer(recipe),
    )


def _initial_weights(recipe: Recipe, run_dir: Path) -> run.Config | None:
    checkpoint = initial_weights(recipe, run_dir)
    if checkpoint is None:
        return None
    weights = str(find_weights(checkpoint))
    return run.Config(nl.RestoreConfig, path=weights, load_optim_state=False, load_artifacts=False)


def _data_module(recipe: Recipe) -> run.Config:
    training = recipe.training
    blend = recipe.data if isinstance(recipe.data, dict) else None
    folder = next(iter(blend)) if blend else recipe.data
    return run.Config(
        HybridDataModule,
        folder=folder,
        blend=blend,
        made_with=recipe.tokenizer,
        packed_documents=training.packed_documents,
        side_channels=recipe.model.get("side_channels"),
        vocab_size=recipe.model["vocab_size"],
        seq_length=recipe.model["seq_length"],
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        num_workers=0,
        pin_memory=False,
        seed=training.seed,
        output_log=False,
    )


def _strategy(recipe: Recipe) -> run.Config:
    training = recipe.training
    ddp = run.Config(
        DistributedDataParallelConfig,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=True,
        use_distributed_optimizer=training.use_distributed_optimizer,
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.gathers_in_forward,
    )
    return run.Config(
        HybridStrategy,
        seed=training.seed,
        init_side_channels=training.init_side_channels,
        **recipe.layout.megatron_fields(),
        pipeline_dtype=dtype_of(recipe),
        ckpt_async_save=training.async_save,
        gradient_as_bucket_view=True,
        ddp=ddp,
    )


def _precision() -> run.Config:
    return run.Config(
        nl.MegatronMixedPrecision,
        precision="bf16-mixed",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )


def _optimizer(recipe: Recipe) -> run.Config:
    training = recipe.training
    same = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    config = run.Config(
        OptimizerConfig,
        optimizer="adam",
        bf16=training.precision == "bf16",
        params_dtype=dtype_of(recipe),
        use_distributed_optimizer=training.use_distributed_optimizer,
        overlap_param_gather=training.gathers_in_forward,
        **{name: getattr(training, name) for name in same},
    )
    schedule = run.Config(
        MegatronScheduler,
        max_steps=training.max_steps,
        warmup_steps=training.warmup_steps,
        warmup_init=training.lr_warmup_init,
        decay_style=training.lr_decay_style,
        wsd_decay_steps=training.lr_wsd_decay_steps,
        wsd_decay_style=training.lr_wsd_decay_style,
    )
    return run.Config(HybridOptimizer, config=config, lr_scheduler=schedule)


def _callbacks(recipe: Recipe, run_dir: Path) -> list[run.Config]:
    training = recipe.training
    callbacks = [
        run.Config(
            RunRecorder,
            run_dir=str(run_dir),
            log_interval=training.log_interval,
            resumed=recipe.resume,
        ),
        run.Config(StopOnNonFinite),
        run.Config(StopEarly, run_dir=str(run_dir), stop_after=training.stop_after),
    ]
    if training.heartbeat_timeout_minutes is not None:
        callbacks.append(
            run.Config(
                Heartbeats,
                run_dir=str(run_dir),
                timeout_minutes=training.heartbeat_timeout_minutes,
                init_timeout_minutes=training.init_timeout_minutes,
            )
        )
    if training.use_pytorch_profiler:
        callbacks.append(
            run.Config(
                StepProfiler,
                folder=str(run_dir / PROFILE_FOLDER),
                start=training.profile_step_start,
                end=training.profile_step_end,
                ranks=training.profile_ranks,
            )
        )
    return callbacks


def _logger(recipe: Recipe, run_dir: Path) -> run.Config:
    training = recipe.training
    return run.Config(
        RunLogger,
        explicit_log_dir=str(run_dir),
        resumed=recipe.resume,
        use_datetime_version=False,
        log_global_rank_0_only=True,
        tensorboard=(
            run.Config(TensorBoardLogger, save_dir=".", name="tensorboard")
            if training.tensorboard
            else None
        ),
        wandb=(
            run.Config(
                RunFolderWandbLogger,
                project=training.wandb_project,
                name=training.wandb_name or run_dir.name,
                save_dir=str(run_dir),
            )
            if training.wandb_project is not None
            else None
        ),
        ckpt=run.Config(
            HybridCheckpoint,
            model_fields=sorted(recipe.model),
            keep_latest=training.keep_latest,
            keep_every=training.keep_every,
            dirpath=str(run_dir / "checkpoints"),
            filename="{step}",
            monitor=None,
            save_top_k=-1,
            save_last=False,
            every_n_train_steps=training.save_interval,
            save_optim_on_train_end=True,
            save_on_train_epoch_end=False,
            always_save_context=False,
            save_context_on_train_end=False,
            auto_insert_metric_name=True,
        ),
    )
