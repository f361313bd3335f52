"""Layout, model and training settings as read from the objects that train.

NeMo's overrides change a factory's configuration after it was validated
(``model.config.add_qkv_bias=true``, ``trainer.strategy.tensor_model_parallel_size=1``), so these
objects are validated again before the ranks start, and a checkpoint describes them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from nemo_megacpp.config import HybridConfig, config_violations
from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.layout import ModelShape, ParallelLayout, validate_layout
from nemo_megacpp.preflight.resume import validate_steps_left
from nemo_megacpp.settings.combinations import training_violations
from nemo_megacpp.settings.validate import setting_violations
from nemo_megacpp.side_channels import read_side_channels


def tokenizer_of(data: Any) -> str | None:
    """Return the fingerprint of the data's tokenizer; None for another data module than ours."""
    return getattr(data, "tokenizer_fingerprint", None)


def validate_wrapper(fsdp: Any, ddp: Any, save_ckpt_format: Any = None) -> None:
    """Refuse FSDP, its checkpoints and PyTorch's DDP, arguments of NeMo's ``MegatronStrategy``."""
    flags = [name for name in ("use_megatron_fsdp", "use_custom_fsdp") if getattr(ddp, name, False)]
    asked = [f"trainer.strategy.fsdp={fsdp!r}"] if fsdp is not None else []
    asked += [f"trainer.strategy.ddp.{name}=True" for name in flags]
    asked += [f"trainer.strategy.ddp={ddp!r}"] if ddp == "pytorch" else []
    if save_ckpt_format == "fsdp_dtensor":
        asked.append(f"trainer.strategy.save_ckpt_format={save_ckpt_format!r}")
    if asked:
        raise UserError(
            f"{' and '.join(asked)}: gradients are reduced, clipped and saved by Megatron's "
            f"DistributedDataParallel here; through NeMo no other wrapper has been shown to keep "
            f"the numbers of every layout (docs/fsdp.md says where FSDP has). Leave it out; "
            f"use_distributed_optimizer=true shards the optimizer's state over data-parallel ranks."
        )


def validate_run_steps_left(checkpoint: Path, trainer: Any) -> None:
    """Refuse to resume where NeMo's overrides (``trainer.max_steps``) leave no step to train.

    Args:
        checkpoint: that is about to be loaded.
        trainer: Lightning's.

    Raises:
        UserError: with both numbers.
    """
    if trainer.max_steps > 0:
        validate_steps_left(checkpoint, trainer.max_steps)


def validate_actual(layout: ParallelLayout, config: HybridConfig, data: Any, node: int) -> None:
    """Refuse a layout that is illegal for the model, and data that do not fit the model.

    Args:
        layout: of the ranks that are about to start.
        config: of the model.
        data: NeMo's data module.
        node: ranks of a node, where there are several nodes; else 0.

    Raises:
        UserError: with the numbers and the legal choices.
    """
    if data.seq_length != config.seq_length:
        raise UserError(
            f"data.seq_length={data.seq_length} and model.config.seq_length={config.seq_length} "
            f"must be equal; give the factory seq_length=…, which sets both."
        )
    vocab_size = getattr(data.tokenizer, "vocab_size", config.vocab_size)
    if vocab_size != config.vocab_size:
        raise UserError(
            f"The tokenizer of the data has {vocab_size} tokens and model.config.vocab_size is "
            f"{config.vocab_size}. Give the factory data=…, whose vocabulary the model takes."
        )
    declared = read_side_channels(config.side_channels)
    if getattr(data, "side_channels", declared) != declared:
        raise UserError(
            f"model.config.side_channels={config.side_channels} and the data module's differ; give "
            f"the factory side_channels=…, which sets both."
        )
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    shape = ModelShape.read(
        {**fields, "pattern": config.pattern}, data.micro_batch_size, data.global_batch_size
    )
    validate_layout(layout, shape, gpus_per_node=node or None)


def validate_training(config: HybridConfig, ddp: Any, optim: Any) -> None:
    """Refuse settings of the run that are neither proved nor neutral.

    Args:
        config: of the model.
        ddp: Megatron's configuration of the data-parallel wrapper.
        optim: NeMo's optimizer module; None for a run that only evaluates.

    Raises:
        UserError: for all such settings.
    """
    optimizer = None if optim is None else optim.config
    raise_violations(
        (
            *config_violations(config, config.pattern),
            *setting_violations(DistributedDataParallelConfig, vars(ddp)),
            *(setting_violations(OptimizerConfig, vars(optimizer)) if optimizer else ()),
            *training_violations(config, ddp, optimizer),
        )
    )
