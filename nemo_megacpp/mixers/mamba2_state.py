"""Mamba-2 on what follows the tokens of a state: a prompt, a part of one, or one token."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.ssm import mamba_mixer
from torch import Tensor

from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d, causal_conv1d_state
from nemo_megacpp.mixers.recurrent_state import RecurrentState

_KERNELS: Any = mamba_mixer
"""The mixer's module names the kernels; the host without a GPU puts torch forms there."""


def mamba2_state(mixer: Any, context: Any, batch: int) -> RecurrentState:
    """Return the window of the convolution ``[b, c, w-1]`` and the states ``[b, h, p, n]`` of a
    Mamba-2 mixer in an inference context.

    Megatron's own are of the model's dtype; these states are float32 at least, as the scan's are.
    """
    dtype = mixer.config.params_dtype
    weight = mixer.cp.get_conv1d_weight()
    shapes = [
        ((weight.size(0), weight.size(-1) - 1), dtype),
        (
            (mixer.cp.nheads_local_tpcp, mixer.headdim, mixer.d_state),
            torch.promote_types(dtype, torch.float32),
        ),
    ]
    return RecurrentState(context, mixer.layer_number, batch, shapes, weight.device)


def mamba2_continue(mixer: Any, projected: Tensor, memory: RecurrentState) -> Tensor:
    """Convolve, scan and gate the tokens after those in ``memory``, and write the states back.

    Megatron's ``_ssm_prefill`` begins at zero, and its ``_ssm_decode`` takes one token of the same
    place of every sequence.

    Args:
        mixer: Megatron's ``MambaMixer``.
        projected: ``[s, b, 2·d + 2·g·n + h]``, its input projection.
        memory: its states.

    Returns:
        ``[s, b, d]``, normed.
    """
    sizes, inner, heads = mixer.cp, mixer.cp.d_inner_local_tpcp, mixer.cp.nheads_local_tpcp
    state_rows = sizes.ngroups_local_tpcp * mixer.d_state
    projected = memory.spread(projected)
    z, xBC, dt = projected.transpose(0, 1).split([inner, inner + 2 * state_rows, heads], dim=-1)
    window, state = memory.read()
    taps = sizes.get_conv1d_weight().squeeze(1)
    filtered = causal_conv1d(xBC, taps, sizes.get_conv1d_bias(), "silu", initial_state=window)
    filtered = memory.clear_before(filtered)
    window = causal_conv1d_state(xBC, taps.size(1), None, window)
    x, B, C = filtered.split([inner, state_rows, state_rows], dim=-1)
    x, z = (t.unflatten(-1, (heads, mixer.headdim)) for t in (x, z))
    B, C = (t.unflatten(-1, (-1, mixer.d_state)) for t in (B, C))
    A = -torch.exp(sizes.get_A_log().float())
    dt_bias, D = sizes.get_dt_bias().float(), sizes.get_D()
    if x.size(1) == 1:
        state = state.clone()

        def wide(numbers: Tensor) -> Tensor:
            return numbers.unsqueeze(-1).expand(*numbers.shape, mixer.headdim)

        y = _KERNELS.selective_state_update(
            state,
            x.squeeze(1),
            wide(dt.squeeze(1)),
            wide(A).unsqueeze(-1).expand(-1, -1, mixer.d_state),
            B.squeeze(1),
            C.squeeze(1),
            wide(D),
            z=z.squeeze(1),
            dt_bias=wide(dt_bias),
            dt_softplus=True,
        ).unsqueeze(1)
    else:
        y, state = _KERNELS.mamba_chunk_scan_combined(
            *(t.contiguous() for t in (x, dt)),
            A,
            *(t.contiguous() for t in (B, C)),
            chunk_size=mixer.chunk_size,
            D=D,
            z=z.contiguous(),
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_states=state,
            return_final_states=True,
        )
    memory.write(window, state)
    y = memory.join(y.flatten(2).transpose(0, 1)).contiguous()
    return mixer.norm(y) if mixer.rmsnorm else y
