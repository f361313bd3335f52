"""Depthwise causal convolution over time, the short filter before a Mamba or M²RNN scan.

The operation of the ``causal_conv1d`` package (Dao-AILab), in plain torch and channels last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype, check_shapes, document_ids

_ACTIVATIONS = (None, "silu")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> None:
    if activation not in _ACTIVATIONS:
        raise UserError(f"activation must be 'silu' or None, got {activation!r}.")
    sizes = check_shapes({"x": (x, "b l c"), "weight": (weight, "c w"), "bias": (bias, "c")})
    if sizes["w"] < 1:
        raise UserError("weight must have at least one tap, [c, w] with w >= 1.")
    check_shapes({"initial_state": (initial_state, "b c w-1")}, **sizes, **{"w-1": sizes["w"] - 1})


class _Heads(NamedTuple):
    """The first ``w-1`` tokens of every document but the row's first: taps lie outside of it.

    Attributes:
        row: ``[m]``, of the batch.
        token: ``[m]``, in the row.
        inside: bool ``[w-1, m, 1]``; does tap ``k`` lie in the token's document?
    """

    row: Tensor
    token: Tensor
    inside: Tensor


class _ShiftedProducts(torch.autograd.Function):
    """``act(bias + Σ_k weight[:, k] · padded[:, k : k + l])``, taps in other documents left out.

    Hand-written backward: autograd would allocate one zero-padded copy of the input for each tap.
    The few tokens with taps in another document are computed apart, by selection: a NaN times zero
    would be a NaN.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        padded: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: _Heads | None,
        silu: bool,
    ) -> Tensor:
        width = weight.shape[1]
        length = padded.shape[1] - width + 1
        rows = weight.t().contiguous()
        pre = padded[:, width - 1 :] * rows[width - 1]
        if bias is not None:
            pre += bias
        for k in range(width - 1):
            pre.addcmul_(padded[:, k : k + length], rows[k])
        if heads is not None:
            own = padded[heads.row, heads.token + width - 1] * rows[width - 1]
            if bias is not None:
                own += bias
            for k in range(width - 1):
                tap = padded[heads.row, heads.token + k].masked_fill_(~heads.inside[k], 0)
                own.addcmul_(tap, rows[k])
            pre[heads.row, heads.token] = own
        ctx.save_for_backward(padded, rows, pre if silu else None, *(heads or ()))
        ctx.has_bias = bias is not None  # type: ignore[attr-defined]
        return F.silu(pre) if silu else pre

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, rows, pre, *of_heads = ctx.saved_tensors  # type: ignore[attr-defined]
        heads = _Heads(*of_heads) if of_heads else None
        if pre is not None:
            grad = torch.ops.aten.silu_backward(grad, pre)
        width, length = rows.shape[0], grad.shape[1]
        need_input, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_padded = torch.zeros_like(padded) if need_input else None
        grad_rows = torch.empty_like(rows) if need_weight else None
        earlier = grad
        if heads is not None:
            own = grad[heads.row, heads.token]
            earlier = grad.index_put((heads.row, heads.token), own.new_zeros(()))
        for k in range(width):
            at_tap = grad if k == width - 1 else earlier
            if grad_padded is not None:
                grad_padded[:, k : k + length].addcmul_(at_tap, rows[k])
            if grad_rows is not None:
                grad_rows[k] = (at_tap * padded[:, k : k + length]).sum(dim=(0, 1))
            if heads is None or k == width - 1:
                continue
            here = heads.row, heads.token + k
            at_tap = own.masked_fill(~heads.inside[k], 0)
            if grad_padded is not None:
                grad_padded.index_put_(here, at_tap * rows[k], accumulate=True)
            if grad_rows is not None:
                grad_rows[k] += at_tap.mul_(padded[here]).sum(dim=0)
        grad_bias = grad.sum(dim=(0, 1)) if ctx.has_bias else None  # type: ignore[attr-defined]
        return grad_padded, None if grad_rows is None else grad_rows.t(), grad_bias, None, None


def _document_heads(ids: Tensor, width: int) -> _Heads | None:
    # What stands before the row (the initial state) belongs to document 0.
    padded = F.pad(ids, (width - 1, 0))
    length = ids.shape[1]
    inside = torch.stack([padded[:, k : k + length] == ids for k in range(width - 1)])
    row, token = (~inside).any(dim=0).nonzero(as_tuple=True)
    return _Heads(row, token, inside[:, row, token, None]) if len(row) else None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution, ``y_t = act(bias + Σ_k weight[:, k] · x_{t - (w-1) + k})``.

    A sum of ``w`` shifted products: on a CPU faster than ``conv1d`` with one group a channel, and
    each channel is computed alone, so a slice of channels gives bit-identical values.

    Args:
        x: ``[b, l, c]``; any float dtype. bfloat16 and float16 accumulate in float32.
        weight: ``[c, w]``; the last column is the tap of the token itself.
        bias: ``[c]``.
        activation: ``'silu'`` or None.
        seq_idx: integer ``[b, l]``; a tap that lies in another document counts zero.
        initial_state: ``[b, c, w-1]``, the ``w-1`` inputs before the row, oldest first. They belong
            to the first document.

    Returns:
        ``y [b, l, c]`` in the dtype of ``x``. :func:`causal_conv1d_state` gives the final window.

    Raises:
        UserError: a shape or the activation is wrong.
    """
    _check(x, weight, bias, activation, initial_state)
    acc = accumulation_dtype(x)
    batch, length, _ = x.shape
    width = weight.shape[1]
    heads = None
    if seq_idx is not None and width > 1:
        heads = _document_heads(document_ids(seq_idx, batch, length), width)
    y: Tensor = _ShiftedProducts.apply(
        _with_history(x.to(acc), width, initial_state),
        weight.to(acc),
        None if bias is None else bias.to(acc),
        heads,
        activation == "silu",
    )
    return y.to(x.dtype)


def causal_conv1d_state(
    x: Tensor, width: int, seq_idx: Tensor | None = None, initial_state: Tensor | None = None
) -> Tensor:
    """Return the final window ``[b, c, width-1]``: what the next segment takes as initial state.

    Inputs of documents other than the last token's are zero, as the next segment must not see them.
    """
    batch, length, _ = x.shape
    window = _with_history(x, width, initial_state)[:, length:]
    if seq_idx is not None:
        ids = F.pad(document_ids(seq_idx, batch, length), (width - 1, 0))
        same = ids[:, length:] == ids[:, -1:]
        window = torch.where(same[..., None], window, torch.zeros_like(window))
    return window.transpose(1, 2)


def _with_history(x: Tensor, width: int, initial_state: Tensor | None) -> Tensor:
    """Put the ``width-1`` inputs before the row, zero by default, in front: ``[b, w-1+l, c]``."""
    if initial_state is None:
        return F.pad(x, (0, 0, width - 1, 0))
    return torch.cat([initial_state.to(x.dtype).transpose(1, 2), x], dim=1)
