"""The M²RNN recurrence on a GPU, in Triton.

Compared with the reference loop in Triton's interpreter, and compiled for NVIDIA's sm_80 and sm_90
(``benchmarks/m2rnn_sass.py``; beyond 32 values a head, the backward pass spills 8 bytes on sm_80);
**not run on a GPU yet**. ``benchmarks/m2rnn.py`` checks and times it on one.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import ClipOrder
from nemo_megacpp.mixers.kernels.m2rnn_scan import check_inputs
from nemo_megacpp.mixers.kernels.packing import document_starts

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# W and its gradient are V×V numbers each, and stay in the registers of one program.
_LARGEST_VALUE_DIM = 64
# Tensor cores take tiles of 16. A program owns 16 rows of the state: with 32 or 64 its registers do
# not hold what the backward pass keeps, and spill (benchmarks/m2rnn_sass.py).
_SMALLEST_TILE = BLOCK_K = 16
CHECKPOINT_EVERY = 64
"""By default, one state in this many is saved for the backward pass."""
_TENSOR_CORES = (8, 0)


@cache
def _kernels() -> ModuleType | str:
    """Return the module with the kernels, or why it cannot be loaded."""
    try:
        from nemo_megacpp.mixers.kernels import m2rnn_triton_kernels
    except Exception as error:  # importing Triton has errors of its own
        return f"cannot be imported ({error})"
    return m2rnn_triton_kernels


def m2rnn_triton_reason(
    *, value_dim: int, dtype: torch.dtype, device: torch.device | None = None
) -> str | None:
    """Return why the Triton kernels cannot run, as what they "need"; None if they can.

    Args:
        value_dim: ``v``.
        dtype: of the activations.
        device: where the activations are; None if that is not known yet.
    """
    if device is not None and device.type != "cuda":
        return "needs a CUDA device"
    if (unfit := unfit_for_triton(value_dim, dtype)) is not None:
        return unfit
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if device is not None and (found := torch.cuda.get_device_capability(device)) < _TENSOR_CORES:
        return f"needs compute capability 8.0; {device} has {found[0]}.{found[1]}"
    return None


def unfit_for_triton(value_dim: int, dtype: torch.dtype) -> str | None:
    """Return what in a model the Triton kernels do not support, on any machine; None if nothing."""
    if value_dim > _LARGEST_VALUE_DIM:
        return f"needs m2rnn_value_head_dim of at most {_LARGEST_VALUE_DIM}; it is {value_dim}"
    if dtype not in _DTYPES:
        return f"computes in float32; the activations are {str(dtype).removeprefix('torch.')}"
    return None


def m2rnn_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    W: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    state_gradient_clip: float | None = None,
    clip_order: ClipOrder = "before_output",
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> tuple[Tensor, Tensor]:
    """:func:`nemo_megacpp.mixers.kernels.m2rnn_scan.m2rnn_scan` on a GPU; computes in float32.

    One program for each head, batch row and 16 rows of the state. No atomics: the same
    inputs give the same bits. Saved for the backward pass, beside the inputs: one state in
    ``checkpoint_every`` (``c``), ``b·n·⌈l/c⌉·k·v`` float32 numbers. Temporary in the backward pass:
    ``b·n·c·k·v`` for states, ``2·b·l·n·k`` for the gradients of q and k per head, and
    ``⌈k/16⌉·b·l·n·v`` for those of v; in the forward pass as many for y.

    Args:
        q, k, v, forget, W, initial_state, seq_idx, state_gradient_clip, clip_order: as there; any
            mix of bfloat16, float16 and float32.
        checkpoint_every: ``c``; the states between are recomputed. Any ``c`` gives the same
            numbers; memory is smallest near the square root of the length.

    Returns:
        ``y [b, l, n, v]`` in the dtype of ``v``, and the final state ``[b, n, k, v]`` in float32.

    Raises:
        UserError: a shape or an option is wrong, or Triton cannot be imported.
    """
    check_inputs(q, k, v, forget, W, initial_state, state_gradient_clip, clip_order)
    if checkpoint_every < 1:
        raise UserError(f"checkpoint_every must be at least 1, got {checkpoint_every}.")
    reason = m2rnn_triton_reason(value_dim=v.shape[-1], dtype=v.dtype)
    if reason is not None:
        raise UserError(f"The Triton M²RNN kernel cannot run: it {reason}.")
    batch, length, heads, value_dim = v.shape
    if initial_state is None:
        shape = (batch, heads, k.shape[-1], value_dim)
        initial_state = v.new_zeros(shape, dtype=torch.float32)
    keep = None
    if seq_idx is not None:
        keep = (~document_starts(seq_idx, batch, length)).to(torch.int8)
    y, final_state = _M2RNNTriton.apply(
        q,
        k,
        v,
        forget,
        W,
        initial_state.float(),
        keep,
        state_gradient_clip,
        clip_order == "before_output",
        min(checkpoint_every, length),
    )
    return y, final_state


def tile_options(key_dim: int, value_dim: int, chunk: int) -> dict[str, int]:
    """Return the constants of both kernels and their warps."""
    block_v = max(_SMALLEST_TILE, 1 << (value_dim - 1).bit_length())
    return {
        "K": key_dim,
        "V": value_dim,
        "BLOCK_K": BLOCK_K,
        "BLOCK_V": block_v,
        "CHUNK": chunk,
        # A 16×16 tile is work for one warp, which then waits for no other.
        "num_warps": block_v // 16,
    }


class _Launch:
    """What both kernels are launched with, from the shapes of the inputs."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int) -> None:
        self.batch, self.length, self.heads, self.value_dim = v.shape
        self.key_dim = k.shape[-1]
        self.parts = math.ceil(self.key_dim / BLOCK_K)
        self.chunks = math.ceil(self.length / chunk)
        self.grid = (self.heads, self.batch, self.parts)
        self.integers = (
            self.length,
            self.heads,
            *(x.shape[2] if x.dim() == 4 else 1 for x in (q, k)),
        )
        self.options = tile_options(self.key_dim, self.value_dim, chunk)

    def states(self, like: Tensor, *axes: int) -> Tensor:
        """Return an empty ``[b, n, *axes, k, v]`` in float32."""
        return self.floats(like, self.batch, self.heads, *axes, self.key_dim, self.value_dim)

    @staticmethod
    def floats(like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)


class _M2RNNTriton(torch.autograd.Function):
    """``(y, final_state)``; ``keep`` is int8 ``[b, l]``, zero where a document starts, or None."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        forget: Tensor,
        W: Tensor,
        initial_state: Tensor,
        keep: Tensor | None,
        clip: float | None,
        clip_before_output: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels()
        assert not isinstance(kernels, str), "m2rnn_triton_reason is checked before"
        inputs = tuple(x.contiguous() for x in (q, k, v, forget, W))
        launch = _Launch(q, k, v, chunk)
        y = launch.floats(v, launch.parts, *v.shape)
        final_state, kept = launch.states(v), launch.states(v, launch.chunks)
        with torch.cuda.device_of(v):
            kernels.m2rnn_forward[launch.grid](
                *inputs,
                keep,
                initial_state.contiguous(),
                y,
                final_state,
                kept,
                *launch.integers,
                HAS_RESETS=keep is not None,
                **launch.options,
            )
        ctx.save_for_backward(*inputs, keep, kept)
        ctx.options = (clip, clip_before_output, chunk)  # type: ignore[attr-defined]
        return y.sum(dim=0).to(v.dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        kernels = _kernels()
        assert not isinstance(kernels, str), "the forward pass has run"
        q, k, v, forget, W, keep, kept = ctx.saved_tensors  # type: ignore[attr-defined]
        clip, before, chunk = ctx.options  # type: ignore[attr-defined]
        launch = _Launch(q, k, v, chunk)
        per_head = (launch.batch, launch.length, launch.heads)
        grad_q, grad_k = (launch.floats(v, *per_head, launch.key_dim) for _ in range(2))
        grad_v = launch.floats(v, launch.parts, *v.shape)
        grad_forget = launch.floats(v, launch.parts, *per_head)
        grad_W = launch.floats(v, launch.parts, launch.batch, *W.shape)
        grad_initial = launch.states(v)
        mode = kernels.CLIP_BEFORE_OUTPUT if before else kernels.CLIP_AFTER_OUTPUT
        with torch.cuda.device_of(v):
            kernels.m2rnn_backward[launch.grid](
                q,
                k,
                v,
                forget,
                W,
                keep,
                kept,
                grad_y.contiguous(),
                grad_final.contiguous(),
                launch.states(v, chunk),
                grad_q,
                grad_k,
                grad_v,
                grad_forget,
                grad_W,
                grad_initial,
                *launch.integers,
                clip or 0.0,
                CLIP=kernels.NO_CLIP if clip is None else mode,
                HAS_RESETS=keep is not None,
                **launch.options,
            )
        gradients = (
            grad_q if q.dim() == 4 else grad_q.sum(dim=2),
            grad_k if k.dim() == 4 else grad_k.sum(dim=2),
            grad_v.sum(dim=0),
            grad_forget.sum(dim=0),
            grad_W.sum(dim=(0, 1)),
        )
        cast = (g.to(x.dtype) for g, x in zip(gradients, (q, k, v, forget, W), strict=True))
        return *cast, grad_initial, None, None, None, None
