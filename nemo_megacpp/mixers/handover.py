"""Hand a recurrent state from one sequence segment to the next, and its gradient back.

A non-linear recurrence has no associative scan: when its heads cannot be spread over cp, the
segments of a sequence run one after another. Rank ``r`` waits for the state that rank ``r - 1``
ends with, runs its segment, and hands its own final state on; in the backward pass the gradients
of these states travel the other way. Exact, and serial in cp.

Messages between two ranks are matched by their order, which must not depend on the order in which
autograd runs nodes. In the forward pass it is the order of the calls. In the backward pass it is
made a dependency of the data: both functions pass an activation through, so that the gradient of a
received state has been sent before anything earlier in the layer is differentiated, and the
gradient of a sent state has been received before anything earlier is. Within a layer, and from
layer to layer, every rank then sees the forward pass's messages in reverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup as Group


def receive_state(
    state: torch.Tensor, through: torch.Tensor, cp_group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state that the previous segment ended with, and ``through`` unchanged.

    Args:
        state: zeros of the state's shape, dtype and device: what the first rank begins with.
        through: an activation that is computed before the state is used and that needs a gradient:
            the state's gradient is sent back before it is differentiated.
        cp_group: ranks in the order of their segments.
    """
    first = cp_group.rank() == 0
    return (state, through) if first else _Receive.apply(state, through, cp_group)


def send_state(state: torch.Tensor, output: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Send ``state`` to the next segment and return ``output`` unchanged.

    The gradient of ``state`` is received from there before ``output`` is differentiated.
    """
    last = cp_group.size() - 1
    return output if cp_group.rank() == last else _Send.apply(state, output, cp_group)


def _neighbour(cp_group: Group, step: int) -> int:
    return torch.distributed.get_global_rank(cp_group, cp_group.rank() + step)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state: torch.Tensor, through: torch.Tensor, cp_group: Group
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.cp_group = cp_group
        received = torch.empty_like(state, memory_format=torch.contiguous_format)
        torch.distributed.recv(received, _neighbour(cp_group, -1), group=cp_group)
        return received, through.view_as(through)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor, through: torch.Tensor
    ) -> tuple[None, torch.Tensor, None]:
        target = _neighbour(ctx.cp_group, -1)
        torch.distributed.send(grad.contiguous(), target, group=ctx.cp_group)
        return None, through, None


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
