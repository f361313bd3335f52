"""What the chunked linear scans share: chunks, decay masks, and states between chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """Cut ``[b, l, ...]`` into ``[b, c, chunk_size, ...]``, padded with zeros at the end."""
    missing = -x.shape[1] % chunk_size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, chunk_size))


class ChunkDecays(NamedTuple):
    """Decays inside and between chunks; zero across documents.

    Attributes:
        inner: ``[b, c, h, q, q]``; the factor of token ``j``'s input at token ``i >= j``.
        incoming: ``[b, c, h, q]``; the factor of the state before the chunk at token ``i``.
        outgoing: ``[b, c, h, q]``; the factor of token ``j``'s input after the chunk.
        total: ``[b, c, h]``; the factor of the state before the chunk after it.
    """

    inner: Tensor
    incoming: Tensor
    outgoing: Tensor
    total: Tensor


class _Decays(torch.autograd.Function):
    """All four decays from the tokens' own, with a backward that adds and never subtracts.

    Autograd through differences of a cumulative sum would take the difference of large sums for the
    small gradient of each token: three digits of float32 are lost under strong decay.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, log_decay: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = log_decay.shape[-1]
        minus_inf = float("-inf")
        incoming = log_decay.cumsum(dim=-1)
        total = incoming[..., -1].clone()
        outgoing = total[..., None] - incoming
        inner = incoming[..., :, None] - incoming[..., None, :]
        future = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
        if ids is None:
            hidden = future
        else:
            # The incoming state belongs to the document of the token before the chunk.
            before, after = F.pad(ids[:, :-1, -1], (1, 0)), ids[:, :, -1]
            hidden = (future | (ids[..., :, None] != ids[..., None, :]))[:, :, None]
            outgoing.masked_fill_((ids != after[..., None])[:, :, None], minus_inf)
            incoming.masked_fill_((ids != before[..., None])[:, :, None], minus_inf)
            total.masked_fill_((before != after)[..., None], minus_inf)
        # Masked before exp: above the diagonal the difference is positive and could overflow.
        inner.masked_fill_(hidden, minus_inf)
        decays = (inner.exp_(), incoming.exp_(), outgoing.exp_(), total.exp_())
        ctx.save_for_backward(*decays)
        return decays

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx,
        grad_inner: Tensor,
        grad_incoming: Tensor,
        grad_outgoing: Tensor,
        grad_total: Tensor,
    ) -> tuple[Tensor, None]:
        inner, incoming, outgoing, total = ctx.saved_tensors  # type: ignore[attr-defined]
        size = inner.shape[-1]
        up_to = torch.ones(size, size, dtype=inner.dtype, device=inner.device).triu()
        earlier = up_to.t() - torch.eye(size, dtype=inner.dtype, device=inner.device)
        # Token t decays every pair (i, j) with j < t <= i.
        pairs = up_to @ (grad_inner * inner)
        grad = pairs.mul_(earlier).sum(dim=-1)
        grad += (grad_incoming * incoming) @ up_to.t()
        grad += (grad_outgoing * outgoing) @ earlier.t()
        grad += (grad_total * total)[..., None]
        return grad, None


def chunk_decays(log_decay: Tensor, ids: Tensor | None) -> ChunkDecays:
    """Build the decays of every chunk.

    Args:
        log_decay: ``[b, c, h, q]``, the logarithm of each token's decay; zero for padding.
        ids: document numbers ``[b, c, q]``, or None where a row is one document.
    """
    return ChunkDecays(*_Decays.apply(log_decay.contiguous(), ids))


class _PassStates(torch.autograd.Function):
    """Carry ``H_{c+1} = total_c · H_c + added_c`` over the chunks, two operations a chunk."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, added: Tensor, total: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        before = torch.empty_like(added)
        state = initial
        for c in range(added.shape[1]):
            before[:, c] = state
            state = torch.addcmul(added[:, c], before[:, c], total[:, c, :, None, None])
        ctx.save_for_backward(before, total)
        return before, state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_before: Tensor, grad_final: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        before, total = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_added = torch.empty_like(before)
        grad = grad_final
        for c in range(before.shape[1] - 1, -1, -1):
            grad_added[:, c] = grad
            grad = torch.addcmul(grad_before[:, c], grad_added[:, c], total[:, c, :, None, None])
        grad_total = (grad_added * before).sum(dim=(-2, -1))
        return grad_added, grad_total, grad


def pass_states(added: Tensor, total: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before every chunk ``[b, c, h, ·, ·]`` and after the last ``[b, h, ·, ·]``.

    Args:
        added: ``[b, c, h, ·, ·]``, what each chunk adds to the state at its end.
        total: ``[b, c, h]``, the decay of a state over each chunk.
        initial: ``[b, h, ·, ·]``; zero if None.
    """
    if initial is None:
        initial = torch.zeros_like(added[:, 0])
    before, final = _PassStates.apply(added, total, initial.to(added.dtype))
    return before, final
