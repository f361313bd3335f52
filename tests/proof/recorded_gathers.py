"""Gathers recorded without NeMo, for tests of the analysis."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.collective_calls import collective_call
from nemo_megacpp.proof.gather_recorder import (
    GatherRecorder,
    RecordedGather,
    tell_parts_apart,
)
from nemo_megacpp.proof.step_result import disturb
from nemo_megacpp.proof.step_spec import StepSpec
from tests.bare import prepare


def record_bare(spec: StepSpec, layout: ParallelLayout) -> list[RecordedGather]:
    """Run one step of ``spec`` in ``layout``, on every rank of it, and return its gathers."""
    step = prepare(spec, layout)
    disturb(spec, step.chunks)
    tell_parts_apart(step.chunks)
    with GatherRecorder(step.chunks) as recorder:
        step.forward_backward()
    return recorder.gathers


class _Backend(TorchDispatchMode):
    """Stands between the recorder and the backend: the addresses that the backend is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        call = collective_call(func, args)
        if call is not None:
            self.given |= {tensor.data_ptr() for tensor in (*call.sent, *call.received)}
        return func(*args, **kwargs or {})


def gather_with_recorder() -> tuple[list[float], bool]:
    """Gather over all ranks: what arrived, and whether the backend had a tensor of the caller."""
    rank = torch.distributed.get_rank()
    mine, whole = torch.full((2,), float(rank)), torch.empty(4)
    with _Backend() as backend, GatherRecorder([]):
        torch.distributed.all_gather_into_tensor(whole, mine)
    return whole.tolist(), bool(backend.given & {mine.data_ptr(), whole.data_ptr()})
