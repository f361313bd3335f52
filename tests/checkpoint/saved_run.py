"""What a run saves, saved on bare ranks: no training, no NeMo."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict
from nemo_megacpp.checkpoint.random_state import random_state, sharded_random_state
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from tests.bare import build_chunks, make_config

TRAINER = {"global_step": 20, "loops": {"fit": [1, 2]}, "scheduler": [{"lr": 1e-3}]}


def save_run(
    folder: str, spec: StepSpec, degrees: str, trainer: Mapping[str, Any] = TRAINER
) -> None:
    """Save the weights folder of a run's checkpoint: the model under ``module.``, Adam's moments,
    which follow from ``trainer["global_step"]``, and the rest; on every rank of the layout."""
    layout = ParallelLayout.parse(degrees)
    start_model_parallel(layout, spec.seed)
    state: dict[str, Any] = dict(trainer)
    for value in nested_values(
        model_sharded_state_dict(build_chunks(make_config(spec, layout), layout))
    ):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            number = len(state)
            state[f"{number}"] = replace(part, key=f"module.{part.key}")
            if isinstance(part, ShardedObject):
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                # Alike on the ranks that hold the same part.
                name = f"{trainer['global_step']} {moment} {part.key} {part.global_offset}"
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                state[f"{number}.{moment}"] = replace(
                    part,
                    key=f"optimizer.state.{moment}.module.{part.key}",
                    data=torch.randn(part.local_shape, generator=generator),
                    dtype=torch.float32,
                )
    state["random_state"] = sharded_random_state(random_state())
    if torch.distributed.get_rank() == 0:
        state["bucket"] = ShardedTensor.from_rank_offsets("optimizer.bucket", torch.arange(13.0))
        state["rng"] = ShardedObject("rng_state", {"seed": 3}, (1,), (0,))
    dist_checkpointing.save(state, folder, content_metadata={"kind": "a run"})
