"""A resolved recipe as Bridge's ``ConfigContainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

from nemo_megacpp.bridge.data import HybridDataset
from nemo_megacpp.bridge.provider import make_provider
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import dtype_of, model_settings
from nemo_megacpp.runs.initial_weights import initial_weights
from nemo_megacpp.runtime.host import current_host

MANAGER = "nemo_megacpp.bridge.checkpointing.HybridCheckpointManager"


def to_config(recipe: Recipe, run_dir: Path) -> ConfigContainer:
    """Return the configuration with which Bridge's ``pretrain`` trains ``recipe``.

    Args:
        recipe: what to train; ``resume`` and ``init_from``, if given, are paths of checkpoints.
        run_dir: where checkpoints, TensorBoard files and metrics go.
    """
    register_allowed_target_prefix("nemo_megacpp.")  # of the classes that Bridge may construct
    training, host = recipe.training, current_host()
    dataset, weights = _dataset(recipe), initial_weights(recipe, run_dir)
    return ConfigContainer(
        model=make_provider(
            {
                **model_settings(recipe, host.device),
                "said": sorted(recipe.model),
                "keep_latest": training.keep_latest,
                "keep_every": training.keep_every,
                "init_side_channels": training.init_side_channels,
            }
        ),
        train=TrainingConfig(
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            train_iters=training.max_steps,
            exit_interval=training.stop_after,
        ),
        validation=ValidationConfig(
            eval_interval=training.val_check_interval, eval_iters=training.limit_val_batches
        ),
        optimizer=_optimizer(recipe),
        scheduler=_scheduler(recipe),
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=True,
            use_distributed_optimizer=training.use_distributed_optimizer,
            overlap_grad_reduce=training.overlap_grad_reduce,
            overlap_param_gather=training.gathers_in_forward,
        ),
        dataset=dataset,
        logger=LoggerConfig(
            log_interval=training.log_interval,
            # RunRecorder logs: Bridge's own reduction of the auxiliary losses waits for ever where
            # one pipeline stage has E blocks and another has none.
            skip_train_metrics_log=True,
            tensorboard_dir=str(run_dir / "tensorboard") if training.tensorboard else None,
            wandb_project=training.wandb_project,
            wandb_exp_name=training.wandb_name or run_dir.name,
            wandb_save_dir=str(run_dir.absolute()) if training.wandb_project else None,
        ),
        # The rows are tokens already; the tokenizer of their text is not needed again.
        tokenizer=TokenizerConfig(
            tokenizer_type="NullTokenizer", vocab_size=recipe.model["vocab_size"]
        ),
        checkpoint=CheckpointConfig(
            save=str(run_dir / "checkpoints"),
            save_interval=training.save_interval,
            load=recipe.resume,
            pretrained_checkpoint=None if weights is None else str(weights),
            ckpt_format="torch_dist",
            async_save=False,
            custom_manager_class=MANAGER,
        ),
        rng=RNGConfig(seed=training.seed),
        dist=DistributedInitConfig(distributed_backend=host.backend),
        mixed_precision="bf16_mixed" if training.precision == "bf16" else None,
    )


def _dataset(recipe: Recipe) -> HybridDataset:
    data: Any = recipe.data
    return HybridDataset(
        sources=data if isinstance(data, dict) or data is None else {data: None},
        vocab_size=recipe.model["vocab_size"],
        seq_length=recipe.model["seq_length"],
        seed=recipe.training.seed,
        packed_documents=recipe.training.packed_documents,
        rows_per_evaluation=recipe.training.limit_val_batches * recipe.training.global_batch_size,
        side_channels=recipe.model.get("side_channels"),
    )


def tokenizer_fingerprint(dataset: HybridDataset) -> str | None:
    """Return the fingerprint of the data's tokenizer, without validating the data again."""
    if dataset.sources is None:
        return dataset.open()[0].tokenizer_fingerprint
    return PreparedData.open(next(iter(dataset.sources))).tokenizer_fingerprint


def _optimizer(recipe: Recipe) -> OptimizerConfig:
    training = recipe.training
    same = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    return OptimizerConfig(
        optimizer="adam",
        bf16=training.precision == "bf16",
        params_dtype=dtype_of(recipe),
        use_distributed_optimizer=training.use_distributed_optimizer,
        overlap_param_gather=training.gathers_in_forward,
        **{name: getattr(training, name) for name in same},
    )


def _scheduler(recipe: Recipe) -> SchedulerConfig:
    training = recipe.training
    return SchedulerConfig(
        lr_decay_style=training.lr_decay_style,
        lr_decay_iters=training.max_steps,
        lr_warmup_iters=training.warmup_steps,
        lr_warmup_init=training.first_lr,
        lr_wsd_decay_iters=training.lr_wsd_decay_steps,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
        start_weight_decay=training.weight_decay,
        end_weight_decay=training.weight_decay,
        weight_decay_incr_style="constant",
    )
