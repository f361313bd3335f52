"""Everything between a Mamba-2 mixer's two projections, in torch: convolution, scan, gate.

Replaces mamba_ssm's ``mamba_split_conv1d_scan_combined`` in Megatron-Core's
``MambaMixer._ssm_training``, with the same argument names and order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d
from nemo_megacpp.mixers.kernels.ssd import Output, ssd_chunked

_NO_LIMIT = (0.0, float("inf"))


def mamba_split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Output:
    """Split ``zxbcdt``, filter x, B and C, scan, and gate the result with ``silu(z)``.

    Upstream applies the gate inside the scan if ``rmsnorm_weight`` is None, as it must be here;
    ``rmsnorm_eps`` and ``norm_before_gate`` then have no effect.

    Args:
        zxbcdt: ``[b, l, 2·d + 2·g·n + h]`` with ``d = h·p``: the channels of z, x, B, C, dt.
        conv1d_weight: ``[d + 2·g·n, w]``; the bias ``[d + 2·g·n]`` or None.
        dt_bias: ``[h]``, as A; the step size is ``softplus(dt + dt_bias)``.
        D: ``[h]`` (then ``headdim``, ``p``, is needed) or ``[h, p]``.
        chunk_size, initial_states, seq_idx, return_final_states: as in :func:`ssd_chunked`.
        ngroups: ``g``.

    Returns:
        ``[b, l, d]`` in the dtype of ``zxbcdt``, and the final state if ``return_final_states``.

    Raises:
        UserError: an option is set that MambaMixer never sets, or a shape does not fit.
    """
    unsupported = {
        "rmsnorm_weight": rmsnorm_weight is not None,
        "outproj_weight": outproj_weight is not None,
        "outproj_bias": outproj_bias is not None,
        f"dt_limit={dt_limit}": tuple(dt_limit) != _NO_LIMIT,
        f"activation={activation!r}": activation != "silu",
    }
    refused = [name for name, is_set in unsupported.items() if is_set]
    if refused:
        raise UserError(
            f"the torch mamba_split_conv1d_scan does not take {', '.join(refused)}: norm and "
            "output projection belong to the mixer, dt_limit is (0, inf), activation 'silu'."
        )
    heads = D.shape[0]
    head_dim = D.shape[1] if D.dim() == 2 else headdim
    if head_dim is None:
        raise UserError(f"headdim must be given when D has shape [h], here [{heads}].")
    inner = heads * head_dim
    doubled_state = conv1d_weight.shape[0] - inner
    if doubled_state <= 0 or doubled_state % (2 * ngroups):
        raise UserError(
            f"conv1d_weight must have d + 2·g·n rows; {conv1d_weight.shape[0]} rows do not fit "
            f"d={inner} (h={heads}, p={head_dim}) and g={ngroups}."
        )
    width = 2 * inner + doubled_state + heads
    if zxbcdt.dim() != 3 or zxbcdt.shape[-1] != width:
        raise UserError(
            f"zxbcdt must have shape [b, l, 2·d + 2·g·n + h] with last size {width}, "
            f"got {list(zxbcdt.shape)}."
        )
    z, xBC, dt = torch.split(zxbcdt, [inner, inner + doubled_state, heads], dim=-1)
    xBC = causal_conv1d(xBC, conv1d_weight, conv1d_bias, "silu", seq_idx=seq_idx)
    x, B, C = torch.split(xBC, [inner, doubled_state // 2, doubled_state // 2], dim=-1)
    result = ssd_chunked(
        x.unflatten(-1, (heads, head_dim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size=chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, head_dim)),
        dt_bias=dt_bias,
        dt_softplus=True,
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=return_final_states,
    )
    if isinstance(result, tuple):
        return result[0].flatten(2), result[1]
    return result.flatten(2)
