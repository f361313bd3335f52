"""The losses of the prediction depths of a run's steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.specs.hybrid_model import HybridModel


def reduced_depth_losses(
    chunks: Sequence[torch.nn.Module], config: HybridConfig, scale: float = 1.0
) -> dict[str, float]:
    """Return the loss of each prediction depth since the last call, and clear them.

    Each is the mean over data-parallel ranks and microbatches of the mean over a microbatch's
    unmasked tokens, named as in Megatron's log: ``mtp_1``, ``mtp_2``. A collective over the
    world's pipeline, context and data groups if the model has depths: every rank must call.

    Args:
        chunks: of the model on this rank, unwrapped.
        config: of the model.
        scale: one over the number of microbatches that were accumulated.
    """
    if not (depths := config.mtp_num_layers or 0):
        return {}
    device = torch.cuda.current_device()
    values = torch.zeros(depths, dtype=torch.float64, device=device)
    for chunk in chunks:
        assert isinstance(chunk, HybridModel), type(chunk)
        if chunk.depth_losses is not None:  # the chunk of the last stage
            values += chunk.depth_losses
            chunk.depth_losses.zero_()
    rows = parallel_state.get_data_parallel_group()
    for group in (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        torch.distributed.all_reduce(values, group=group)
    means = values * scale / rows.size()
    return {f"mtp_{depth}": float(loss) for depth, loss in enumerate(means, start=1)}
