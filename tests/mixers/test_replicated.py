"""Gradients of parameters that all tensor-parallel ranks hold are summed, whatever their strides.

Values are small integers in float64: every comparison is exact.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

from nemo_megacpp.core.releases import imported, series_of
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.replicated import mark_replicated, replicated, sum_over_tp
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool

VALUE = torch.arange(6.0, dtype=torch.float64).view(2, 3)


def _group() -> torch.distributed.ProcessGroup:
    start_model_parallel(ParallelLayout.parse("tp=2"))
    return parallel_state.get_tensor_model_parallel_group()


def _gradient(copied: torch.Tensor, x: torch.Tensor, rank: int, *, transposed: bool) -> Any:
    """Return the gradient that reaches ``x`` when ``VALUE · (rank + 1)`` flows into its copy."""
    grad = VALUE * (rank + 1)
    if transposed:
        grad = grad.t().contiguous().t()
        assert not grad.is_contiguous()
    copied.backward(grad)
    assert x.grad is not None
    return x.grad.numpy()


def _copies(transposed: bool, sequence_parallel: bool) -> tuple[Any, Any]:
    group = _group()
    ours, stock = (torch.zeros(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    config: Any = SimpleNamespace(sequence_parallel=sequence_parallel)
    copied = replicated(ours, config, group)
    return (
        _gradient(copied, ours, group.rank(), transposed=transposed),
        _gradient(
            copy_to_tensor_model_parallel_region(stock, group),
            stock,
            group.rank(),
            transposed=transposed,
        ),
    )


def test_contiguous_gradient_is_summed(ranks: WorkerPool) -> None:
    for ours, stock in ranks.run(2, _copies, False, False):
        assert (ours == 3 * VALUE.numpy()).all()
        assert (stock == 3 * VALUE.numpy()).all()


def test_strided_gradient_is_summed(ranks: WorkerPool) -> None:
    """Megatron's own operator loses the sum in 0.16: the reason for having another one."""
    loses = series_of(imported()) == "0.16"
    for rank, (ours, stock) in enumerate(ranks.run(2, _copies, True, False)):
        assert (ours == 3 * VALUE.numpy()).all()
        assert (stock == (rank + 1 if loses else 3) * VALUE.numpy()).all()


def test_with_sequence_parallelism_the_sum_is_left_to_megatron(ranks: WorkerPool) -> None:
    for rank, (ours, _) in enumerate(ranks.run(2, _copies, False, True)):
        assert (ours == (rank + 1) * VALUE.numpy()).all()


def test_the_tag_follows_sequence_parallelism() -> None:
    for sequence_parallel in (False, True):
        parameter: Any = torch.nn.Parameter(torch.zeros(1))
        config: Any = SimpleNamespace(sequence_parallel=sequence_parallel)
        mark_replicated(parameter, config)
        assert parameter.sequence_parallel is sequence_parallel


def _sum(transposed: bool) -> tuple[Any, Any, bool]:
    group = _group()
    value = VALUE * (group.rank() + 1)
    if transposed:
        value = value.t().contiguous().t()
    x = value.clone().requires_grad_()
    total = sum_over_tp(x, group)
    grad = _gradient(total, x, group.rank(), transposed=transposed)
    return total.detach().numpy(), grad, torch.equal(x, value)


def test_sum_over_tp(ranks: WorkerPool) -> None:
    """Summed forward and backward, and the input is left as it was."""
    for transposed in (False, True):
        for total, grad, kept in ranks.run(2, _sum, transposed):
            assert (total == 3 * VALUE.numpy()).all()
            assert (grad == 3 * VALUE.numpy()).all()
            assert kept
