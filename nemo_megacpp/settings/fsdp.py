"""What Megatron's FSDP is refused with, as messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.core.fsdp import STRATEGIES, problem_with_fsdp
from nemo_megacpp.families import added

_CONFIG = "DistributedDataParallelConfig"
_ASKED = f"{_CONFIG}.use_megatron_fsdp=True"


def fsdp_violations(model: TransformerConfig, ddp: DistributedDataParallelConfig) -> Iterator[str]:
    """Yield settings of the wrapper and the model that Megatron's FSDP is not proved with, or that
    it alone would read.

    Args:
        model: a ``HybridConfig``, or the plain configuration of a Megatron script.
        ddp: the wrapper's.
    """
    strategy = ddp.data_parallel_sharding_strategy
    if not ddp.use_megatron_fsdp:
        if ddp.use_custom_fsdp:
            yield f"{_CONFIG}.use_custom_fsdp=True: it is use_megatron_fsdp now. Legal: False."
        if strategy != "no_shard":
            yield (
                f"{_CONFIG}.data_parallel_sharding_strategy={strategy!r} has no effect without "
                f"use_megatron_fsdp=True. Legal: 'no_shard'."
            )
        return
    problem = problem_with_fsdp()
    if problem is not None:
        yield f"{_ASKED}: {problem}. Legal: False."
        return
    if strategy == "no_shard":
        legal = ", ".join(map(repr, STRATEGIES))
        yield (
            f"{_ASKED} with data_parallel_sharding_strategy='no_shard' shards nothing; Megatron's "
            f"DistributedDataParallel does the same. Legal: {legal}, or leave FSDP out."
        )
    stages = model.pipeline_model_parallel_size
    if stages > 1:
        yield (
            f"{_ASKED} with PP={stages}: Megatron's mesh of FSDP has the axes dp-cp, ep and tp "
            f"only, and they must fill the world. Legal: PP=1."
        )
    if not ddp.use_distributed_optimizer:
        yield (
            f"{_ASKED} with use_distributed_optimizer=False: FSDP's parameters can be stepped "
            f"only by the distributed optimizer. Legal: True."
        )
    yield from _gradients(model, ddp)
    for name in ("average_in_collective", "nccl_ub", "delay_wgrad_compute"):
        if getattr(ddp, name):
            yield f"{_CONFIG}.{name}=True: no case has it under FSDP. Legal: False."
    if getattr(model, "mtp_num_layers", None):
        yield (
            f"mtp_num_layers={model.mtp_num_layers}: no case has multi-token prediction under FSDP."
        )
    # Of a model that does not say its pattern, as a script's, any family that is registered counts.
    pattern = getattr(model, "pattern", None)
    if users := [b.letter for b in added() if pattern is None or b.letter in pattern.letters]:
        yield (
            f"{_ASKED} with the families {', '.join(users)} of family_modules: FSDP gathers the "
            f"parameters of a layer of Megatron's TransformerLayer or MambaLayer; no case covers "
            f"others."
        )


def _gradients(model: TransformerConfig, ddp: Any) -> Iterator[str]:
    """Yield types in which the sum of a gradient would depend on the number of ranks."""
    name = "megatron_fsdp_main_grads_dtype"
    if model.bf16 and getattr(ddp, name) != torch.float32:
        yield (
            f"{_CONFIG}.{name}={getattr(ddp, name)}: in bf16 FSDP would sum gradients in bfloat16 "
            f"(it does not read grad_reduce_in_fp32), and their number per rank would change the "
            f"sum. Legal: torch.float32 (--megatron-fsdp-main-grads-dtype fp32)."
        )
