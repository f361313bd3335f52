"""How much of the hardware a run uses: TFLOP/s of each rank, and MFU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_megacpp.contract.stages import read_chunk
from nemo_megacpp.contract.work import step_operations
from nemo_megacpp.runtime.host import current_host

PEAK_BF16_TFLOPS: Mapping[str, float] = MappingProxyType(
    {
        "A100": 312.0,
        "H100": 989.4,
        "H100 PCIe": 756.5,
        "H100 NVL": 835.5,
        "H200": 989.4,
        "H200 NVL": 835.5,
        "GH200": 989.4,
        "L40S": 362.0,
        "B200": 2250.0,
        "B300": 2250.0,
        "GB200": 2500.0,
        "GB300": 2500.0,
    }
)
"""Peak of bf16 matrix products without sparsity, in TFLOP/s, by words of CUDA's device name (SXM
sockets add none). From NVIDIA's data sheets of these GPUs and of the HGX and NVL72 systems, most of
which give the double: with sparsity."""


def peak_tflops(device_name: str, config: Any) -> float | None:
    """Return the peak that MFU is relative to, in TFLOP/s; None if it is not known.

    In fp32 and fp8 matrix products of one model run at several precisions (TF32 and fp32, fp8 and
    bf16), so there is no one peak.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        config: Megatron's configuration of the model.
    """
    if not config.bf16 or config.fp8:
        return None
    words = device_name.replace("-", " ").split()
    known = [name for name in PEAK_BF16_TFLOPS if set(name.split()) <= set(words)]
    return PEAK_BF16_TFLOPS[max(known, key=len)] if known else None


class Throughput:
    """Speed of a run from the seconds of a step; a collective over all ranks when constructed.

    Args:
        chunks: of the model on this rank.
        config: of the model.
        tokens: of a step, in the whole job.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config: Any, tokens: int):
        cuda = current_host().device == "cuda"
        self.unit = "GPU" if cuda else "rank"
        self.tokens = tokens
        here = step_operations(config, map(read_chunk, chunks), tokens)
        total = torch.tensor(float(here), dtype=torch.float64, device=torch.cuda.current_device())
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_reduce(total, group=group)
        self.tflop_per_rank = float(total) / torch.distributed.get_world_size() / 1e12
        self.peak = peak_tflops(torch.cuda.get_device_name(), config) if cuda else None

    def of(self, seconds: float) -> dict[str, float]:
        """Return the speed of a step: tokens/s of the job, TFLOP/s of a rank, and MFU if known."""
        tflops = self.tflop_per_rank / seconds
        speed = {"tokens_per_second": self.tokens / seconds, "tflops_per_rank": tflops}
        return speed if self.peak is None else {**speed, "mfu": tflops / self.peak}
