"""Validation of what a Megatron script that builds the stack sets beside its model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.core.fsdp import STRATEGIES
from nemo_megacpp.errors import raise_violations
from nemo_megacpp.settings.combinations import training_violations
from nemo_megacpp.settings.fsdp_checkpoint import fsdp_checkpoint_violations
from nemo_megacpp.settings.validate import default_of, setting_violations

_ARGUMENTS = "megatron.training.global_vars"
_RENAMED = {
    "grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32",
    "check_for_nan_in_grad": "check_for_nan_in_loss_and_grad",
    "bucket_size": "ddp_bucket_size",
    "pad_buckets_for_high_nccl_busbw": "ddp_pad_buckets_for_high_nccl_busbw",
    "reduce_scatter_with_fp32_accumulation": "ddp_reduce_scatter_with_fp32_accumulation",
    "average_in_collective": "ddp_average_in_collective",
}
"""Field of ``DistributedDataParallelConfig`` -> argument (``megatron/training/training.py``)."""


def validate_script(model: TransformerConfig) -> None:
    """Validate the data-parallel wrapper and the optimizer of a Megatron script's arguments.

    A script passes the stack only the model's configuration, and builds the other two from its
    arguments afterwards. In a process that does not run such a script this does nothing.

    Args:
        model: the model's configuration.

    Raises:
        UserError: settings that are neither proved nor neutral.
    """
    args = _arguments()
    if args is None:
        return
    ddp = _fields_from(args, DistributedDataParallelConfig, _RENAMED)
    if not ddp["use_megatron_fsdp"] and ddp["data_parallel_sharding_strategy"] in STRATEGIES:
        # A script's default is not the configuration's, and is not read.
        ddp["data_parallel_sharding_strategy"] = "no_shard"
    optimizer = _fields_from(args, OptimizerConfig, {})
    wrapper: Any = SimpleNamespace(**ddp)
    raise_violations(
        (
            *_argument_violations(model, args),
            *setting_violations(DistributedDataParallelConfig, ddp),
            *setting_violations(OptimizerConfig, optimizer),
            *training_violations(model, wrapper, SimpleNamespace(**optimizer)),
        )
    )


def _argument_violations(model: TransformerConfig, args: Any) -> Iterator[str]:
    if getattr(args, "use_torch_fsdp2", False):
        yield "--use-torch-fsdp2: no case covers torch's FSDP. Leave it out."
    if getattr(args, "use_megatron_fsdp", False):
        yield from fsdp_checkpoint_violations(model, args)
    if getattr(args, "dataloader_inter_document_masking", False):
        yield (
            "--dataloader-inter-document-masking: no case covers the packs of the script's own "
            "data loader. Leave it out, or train packed_documents=true with nemo-megacpp train."
        )
    if getattr(args, "logits_load_dir", None) is not None:
        yield "--logits-load-dir: no case covers its distillation loss. Leave it out."
    if model.mtp_num_layers and model.context_parallel_size > 1:
        yield (
            f"--mtp-num-layers {model.mtp_num_layers} with CP={model.context_parallel_size}: the "
            f"script's model averages the losses of prediction depths over each context-parallel "
            f"rank's own tokens, whose number differs between ranks. Use CP=1."
        )
    if model.mtp_num_layers and not getattr(args, "untie_embeddings_and_output_weights", True):
        yield (
            f"--mtp-num-layers {model.mtp_num_layers} with tied embeddings: on several stages "
            f"Megatron's HybridModel allocates a second head that nothing trains. Add "
            f"--untie-embeddings-and-output-weights."
        )
    # A script's loss function divides by the unmasked tokens of one context-parallel rank.
    if model.context_parallel_size == 1 or model.calculate_per_token_loss:
        return
    for name in ("eod_mask_loss", "sft"):
        if getattr(args, name, False):
            yield (
                f"--{name.replace('_', '-')} with CP={model.context_parallel_size}: the script "
                f"averages the loss over each context-parallel rank's own unmasked tokens, whose "
                f"number differs between ranks. Add --calculate-per-token-loss, "
                f"use CP=1, or train with nemo-megacpp train."
            )


def _arguments() -> Any:
    """Return the arguments of the script that this process runs, or None."""
    module = sys.modules.get(_ARGUMENTS)
    try:
        return None if module is None else module.get_args()
    except AssertionError:  # imported, and not initialised
        return None


def _fields_from(args: Any, kind: type, renamed: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a configuration that the script would build from its arguments."""
    return {
        field.name: getattr(args, renamed.get(field.name, field.name), default_of(field))
        for field in dataclasses.fields(kind)
    }
