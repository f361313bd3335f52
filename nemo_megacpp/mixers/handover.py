"""Hand a recurrent state from one sequence segment to the next, and its gradient back.

A non-linear recurrence has no associative scan: when its heads cannot be spread over cp, the
segments of a sequence run one after another. Rank ``r`` waits for the state that rank ``r - 1``
ends with, runs its segment, and hands its own final state on; in the backward pass the gradients
of these states travel the other way. Exact, and serial in cp.

The gradient is sent by the backward pass of what was received: differentiate with ``backward()``.
``autograd.grad`` of a few chosen inputs would skip it, and the previous rank would wait for ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup as Group


def receive_state(state: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Return the state that the previous segment ended with; ``state`` on the first rank.

    Args:
        state: zeros of the state's shape, dtype and device, requiring grad so that autograd keeps
            the edge over which the gradient is sent back.
        cp_group: ranks in the order of their segments.
    """
    return _Receive.apply(state, cp_group) if cp_group.rank() > 0 else state


def send_state(state: torch.Tensor, output: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Hand ``state`` to the next segment and return ``output`` unchanged.

    Passing ``output`` through ties the sending to it: whoever differentiates the output also waits
    for the gradient that the next segment sends back for ``state``.
    """
    last = cp_group.size() - 1
    return output if cp_group.rank() == last else _Send.apply(state, output, cp_group)


def _neighbour(cp_group: Group, step: int) -> int:
    return torch.distributed.get_global_rank(cp_group, cp_group.rank() + step)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, cp_group: Group) -> torch.Tensor:
        ctx.cp_group = cp_group
        received = torch.empty_like(state, memory_format=torch.contiguous_format)
        torch.distributed.recv(received, _neighbour(cp_group, -1), group=cp_group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        target = _neighbour(ctx.cp_group, -1)
        torch.distributed.send(grad.contiguous(), target, group=ctx.cp_group)
        return torch.zeros_like(grad), None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state: torch.Tensor, output: torch.Tensor, cp_group: Group
    ) -> torch.Tensor:
        ctx.cp_group = cp_group
        ctx.like = torch.empty_like(state, memory_format=torch.contiguous_format)
        torch.distributed.send(state.contiguous(), _neighbour(cp_group, 1), group=cp_group)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        received = ctx.like
        torch.distributed.recv(received, _neighbour(ctx.cp_group, 1), group=ctx.cp_group)
        return received, grad, None
