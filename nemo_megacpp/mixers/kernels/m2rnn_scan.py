"""M²RNN, a non-linear RNN with a matrix state per head, in plain torch.

The recurrence of arXiv 2603.14360 (lm-engine, XMA)::

    Z_t = tanh(H_{t-1} W + k_t v_tᵀ);   H_t = f_t H_{t-1} + (1 - f_t) Z_t;   y_t = H_tᵀ q_t

The skip ``D·v_t``, the norm and the gate belong to the mixer.
"""

from __future__ import annotations

from torch import Tensor

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import ClipOrder
from nemo_megacpp.mixers.kernels.m2rnn_autograd import M2RNNFunction
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype, check_shapes, document_starts

_CLIP_ORDERS = ("before_output", "after_output")
CHECKPOINT_EVERY = 16
"""By default, one state in this many is saved for the backward pass."""


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    clip: float | None,
    clip_order: str,
) -> None:
    shapes = {
        "v": (v, "b l n v"),
        "k": (k, "b l n k" if k.dim() == 4 else "b l k"),
        "q": (q, "b l n k" if q.dim() == 4 else "b l k"),
        "forget": (forget, "b l n"),
        "W": (W, "n v v"),
        "initial_state": (initial_state, "b n k v"),
    }
    check_shapes(shapes)
    if clip is not None and not clip > 0:
        raise UserError(f"state_gradient_clip must be positive or None, got {clip}.")
    if clip_order not in _CLIP_ORDERS:
        raise UserError(f"clip_order must be one of {list(_CLIP_ORDERS)}, got {clip_order!r}.")


def m2rnn_scan(
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
    """Run the M²RNN recurrence over a batch of sequences, with a hand-written backward.

    Heads never mix, so a slice of heads gives bit-identical values.

    Args:
        q: ``[b, l, k]``, one head shared by all, or ``[b, l, n, k]``.
        k: as q.
        v: ``[b, l, n, v]``; float64 accumulates in float64, every other dtype in float32.
        forget: ``[b, l, n]``, the forget gates f_t, already in (0, 1).
        W: ``[n, v, v]``, the state transition of each head.
        initial_state: ``[b, n, k, v]``, zero by default; belongs to the first document of each row.
        seq_idx: integer ``[b, l]``; the state is zero again wherever the value changes.
        state_gradient_clip: bound of the carried state gradient, applied elementwise at every
            token; None leaves the gradient exact. With a bound, all gradients that pass through
            the state are those of the clipped backward pass, not of the function.
        clip_order: ``'before_output'`` clips what later tokens (and the final state) send back,
            then adds this token's ``q_t·dy_tᵀ``, as XMA's Triton kernel does; ``'after_output'``
            clips the sum, as XMA's torch reference does. The initial state's gradient is not
            clipped again, so a sequence cut in two gives the gradients of the whole.
        checkpoint_every: ``c``: save one state in this many for the backward pass,
            ``b·n·⌈l/c⌉·k·v`` numbers, and recompute the others. Any ``c`` gives the same numbers.

    Returns:
        ``y [b, l, n, v]`` in the dtype of ``v``, and the final state ``[b, n, k, v]`` in the
        accumulation dtype.

    Raises:
        UserError: a shape or an option is wrong.
    """
    check_inputs(q, k, v, forget, W, initial_state, state_gradient_clip, clip_order)
    if checkpoint_every < 1:
        raise UserError(f"checkpoint_every must be at least 1, got {checkpoint_every}.")
    acc = accumulation_dtype(v)
    batch, length, heads, value_dim = v.shape
    if initial_state is None:
        initial_state = v.new_zeros(batch, heads, k.shape[-1], value_dim, dtype=acc)
    keep = None if seq_idx is None else ~document_starts(seq_idx, batch, length)
    y, final_state = M2RNNFunction.apply(
        q.to(acc),
        k.to(acc),
        v.to(acc),
        forget.to(acc),
        W.to(acc),
        initial_state.to(acc),
        keep,
        state_gradient_clip,
        clip_order == "before_output",
        checkpoint_every,
    )
    return y.to(v.dtype), final_state
