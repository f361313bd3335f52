"""One token of Mamba-2's scan, in plain torch."""

from __future__ import annotations

from torch import Tensor, exp
from torch.nn import functional as F

from nemo_megacpp.mixers.kernels.packing import accumulation_dtype, check_groups, check_shapes
from nemo_megacpp.mixers.kernels.ssd import step_size


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Scan one token: ``S ← exp(ΔA) S + Δ x Bᵀ``, ``y = S C + D x``.

    Same meaning and argument names as mamba_ssm's kernel, and the numbers of :func:`ssd_chunked`.

    Args:
        state: ``[slots, h, p, n]``. Changed in place.
        x: ``[b, h, p]``.
        dt: ``[b, h, p]``, Δ before its bias and softplus.
        A: ``[h, p, n]``.
        B: ``[b, g, n]``; heads fall in ``g`` consecutive blocks. So does C.
        D: ``[h, p]``, as ``dt_bias``.
        z: ``[b, h, p]``: the result is gated with ``silu(z)``.
        dt_softplus: take the softplus of Δ.
        state_batch_indices: ``[b]``, the slot of each row; row ``i`` has slot ``i`` if not given.

    Returns:
        ``[b, h, p]`` in the dtype of ``x``. Float64 computes in float64, the others in float32.

    Raises:
        UserError: a shape does not fit.
    """
    rows = slice(len(x)) if state_batch_indices is None else state_batch_indices
    sizes = check_shapes(
        {
            "x": (x, "b h p"),
            "dt": (dt, "b h p"),
            "A": (A, "h p n"),
            "B": (B, "b g n"),
            "C": (C, "b g n"),
            "D": (D, "h p"),
            "z": (z, "b h p"),
            "dt_bias": (dt_bias, "h p"),
            "state": (state[rows], "b h p n"),
        }
    )
    check_groups(sizes["h"], sizes["g"])
    acc = accumulation_dtype(x)
    step = step_size(dt, dt_bias, dt_softplus, acc)
    # [b, h, 1, n]
    per_group = sizes["h"] // sizes["g"]
    key, query = (t.to(acc).repeat_interleave(per_group, dim=1).unsqueeze(2) for t in (B, C))
    entering = (step * x.to(acc)).unsqueeze(-1) * key
    now = exp(step.unsqueeze(-1) * A.to(acc)) * state[rows].to(acc) + entering
    state[rows] = now.to(state.dtype)
    y = (now * query).sum(-1)
    if D is not None:
        y = y + D.to(acc) * x.to(acc)
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype)
