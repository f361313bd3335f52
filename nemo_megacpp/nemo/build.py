"""A resolved recipe as the NeMo-Run configuration of ``llm.pretrain``."""

from __future__ import annotations

from pathlib import Path

import nemo_run as run
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.nemo.callbacks import RunRecorder
from nemo_megacpp.nemo.checkpoint import HybridCheckpoint
from nemo_megacpp.nemo.data import HybridDataModule
from nemo_megacpp.nemo.events import EventRecorder
from nemo_megacpp.nemo.model import HybridModel, HybridModelConfig
from nemo_megacpp.nemo.optimizer import HybridOptimizer
from nemo_megacpp.nemo.stops import StopAfter, StopOnNonFinite, StopOnSigterm
from nemo_megacpp.nemo.strategy import HybridStrategy
from nemo_megacpp.recipes.catalog import Training
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.shape import model_settings
from nemo_megacpp.runs.run_folder import METRICS_FILE
from nemo_megacpp.runtime.host import current_host


def to_pretrain(recipe: Recipe, run_dir: Path, *, devices: int, num_nodes: int = 1) -> run.Partial:
    """Return ``run.Partial(llm.pretrain, …)`` for ``recipe``.

    Args:
        recipe: what to train; ``resume``, if given, is the path of a checkpoint.
        run_dir: where checkpoints, TensorBoard files and metrics go.
        devices: ranks per node.
        num_nodes: nodes.
    """
    training, layout = recipe.training, recipe.layout
    cpu = current_host().device == "cpu"
    dtype = torch.float32 if training.precision == "fp32" else torch.bfloat16
    return run.Partial(
        llm.pretrain,
        model=run.Config(HybridModel, config=_model_config(recipe)),
        data=_data_module(recipe),
        trainer=run.Config(
            nl.Trainer,
            accelerator="cpu" if cpu else "gpu",
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
            plugins=_precision(dtype),
            callbacks=_callbacks(recipe, run_dir),
            strategy=_strategy(layout, training, dtype),
        ),
        log=_logger(recipe, run_dir),
        resume=run.Config(
            nl.AutoResume,
            resume_from_path=recipe.resume,
            resume_if_exists=False,
        ),
        optim=_optimizer(training, dtype),
    )


def _model_config(recipe: Recipe) -> run.Config:
    return run.Config(HybridModelConfig, **model_settings(recipe, current_host().device))


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
        vocab_size=recipe.model["vocab_size"],
        seq_length=recipe.model["seq_length"],
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        num_workers=0,
        pin_memory=False,
        seed=training.seed,
        output_log=False,
    )


def _strategy(layout: ParallelLayout, training: Training, dtype: torch.dtype) -> run.Config:
    return run.Config(
        HybridStrategy,
        seed=training.seed,
        **layout.megatron_fields(),
        pipeline_dtype=dtype,
        ckpt_async_save=training.async_save,
        gradient_as_bucket_view=True,
        ddp=run.Config(
            DistributedDataParallelConfig,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=True,
            use_distributed_optimizer=training.use_distributed_optimizer,
        ),
    )


def _precision(dtype: torch.dtype) -> run.Config | None:
    if dtype is torch.float32:
        return None
    return run.Config(
        nl.MegatronMixedPrecision,
        precision="bf16-mixed",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )


def _optimizer(training: Training, dtype: torch.dtype) -> run.Config:
    return run.Config(
        HybridOptimizer,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=training.lr,
            min_lr=training.min_lr,
            weight_decay=training.weight_decay,
            adam_beta1=0.9,
            adam_beta2=training.adam_beta2,
            adam_eps=1e-8,
            clip_grad=training.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=training.use_distributed_optimizer,
        ),
        lr_scheduler=run.Config(
            nl.lr_scheduler.CosineAnnealingScheduler,
            max_steps=training.max_steps,
            warmup_steps=training.warmup_steps,
            constant_steps=0,
            min_lr=training.min_lr,
        ),
    )


def _callbacks(recipe: Recipe, run_dir: Path) -> list[run.Config]:
    training = recipe.training
    callbacks = [
        run.Config(
            RunRecorder,
            path=str(run_dir / METRICS_FILE),
            log_interval=training.log_interval,
        ),
        run.Config(
            EventRecorder,
            run_dir=str(run_dir),
            resumed=recipe.resume,
        ),
        run.Config(StopOnNonFinite),
        run.Config(StopOnSigterm, run_dir=str(run_dir)),
    ]
    if training.stop_after is not None:
        callbacks.append(run.Config(StopAfter, step=training.stop_after))
    return callbacks


def _logger(recipe: Recipe, run_dir: Path) -> run.Config:
    training = recipe.training
    return run.Config(
        nl.NeMoLogger,
        explicit_log_dir=str(run_dir),
        use_datetime_version=False,
        log_global_rank_0_only=True,
        tensorboard=(
            run.Config(TensorBoardLogger, save_dir=".", name="tensorboard")
            if training.tensorboard
            else None
        ),
        wandb=(
            run.Config(
                WandbLogger,
                project=training.wandb_project,
                name=training.wandb_name or run_dir.name,
                save_dir=".",
            )
            if training.wandb_project is not None
            else None
        ),
        ckpt=run.Config(
            HybridCheckpoint,
            model_fields=sorted(recipe.model),
            keep_last=training.keep_last,
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
