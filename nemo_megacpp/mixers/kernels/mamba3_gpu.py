"""mamba_ssm's Triton kernel for Mamba-3 SISO behind the signature of our own scan.

Written against mamba_ssm 2.3.2.post1 (``ops/triton/mamba3/mamba3_siso_combined.py``). In Triton's
interpreter the kernel agrees with :func:`mamba3_chunked`, gradients included, to bf16's rounding;
**not run on a GPU yet**. By its source it holds Q, K, V, trap and the accumulated angle in bf16 (an
angle near 2π to about 0.02 rad) and approximates sigmoid, tanh, sin and cos in hardware, so it
agrees in bf16 only. That release's MIMO kernel, in TileLang, is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nemo_megacpp.mixer_settings import Mamba3Dimensions

_CHUNK_SIZE = 64
_SMALLEST_TILE = 16


def mamba3_gpu_reason(
    dims: Mamba3Dimensions,
    *,
    dtype: torch.dtype,
    packed: bool = False,
    device: torch.device | None = None,
) -> str | None:
    """Return why the Triton kernel cannot run, as what it "needs"; None if it can.

    Args:
        dims: sizes of the mixer.
        dtype: of the activations.
        packed: whether rows hold several documents.
        device: where the activations are; None if that is not known yet.
    """
    if device is not None and device.type != "cuda":
        return "needs a CUDA device"
    if dims.mimo_rank != 1:
        return f"needs SISO; mamba3_mimo_rank is {dims.mimo_rank}"
    if dims.pairs != "interleaved":
        return f"needs interleaved pairs of channels; mamba3_pairs is {dims.pairs!r}"
    for name in ("head_dim", "state_dim"):
        size = getattr(dims, name)
        if size < _SMALLEST_TILE or size & (size - 1):
            return f"needs a power of two from {_SMALLEST_TILE}; mamba_{name} is {size}"
    if dims.num_angles % 2:
        return f"needs an even number of angles; this model has {dims.num_angles}"
    if dtype != torch.bfloat16:
        return f"needs bfloat16; the activations are {str(dtype).removeprefix('torch.')}"
    if packed:
        return "has not been tried with packed sequences"
    kernel = _siso_kernel()
    return kernel if isinstance(kernel, str) else None


def mamba3_gpu(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    theta: Tensor,
    D: Tensor,
) -> Tensor:
    """Scan with the Triton kernel, where :func:`mamba3_gpu_reason` is None; not run on a GPU yet.

    Args:
        x: ``[b, l, h, p]``.
        B, C: ``[b, l, 1, g, n]`` after their norms.
        B_bias, C_bias: ``[h, 1, n]``.
        dt, A: ``[b, l, h]``, Δ and A.
        trap: ``[b, l, h]`` before its sigmoid, which the kernel takes.
        theta: ``[b, l, s]`` before its tanh, likewise.
        D: ``[h]``.

    Returns:
        ``o [b, l, h, 1, p]``, not gated.
    """
    kernel = _siso_kernel()
    assert not isinstance(kernel, str), "mamba3_gpu_reason is checked before"
    dt, A = dt.float(), A.float()
    o = kernel(
        Q=C.squeeze(2),
        K=B.squeeze(2),
        V=x,
        ADT=(A * dt).transpose(1, 2),
        DT=dt.transpose(1, 2),
        Trap=trap.transpose(1, 2),
        Q_bias=C_bias.squeeze(1).float(),
        K_bias=B_bias.squeeze(1).float(),
        Angles=theta.float().unsqueeze(2).expand(-1, -1, x.shape[2], -1),
        D=D.float(),
        Z=None,
        chunk_size=_CHUNK_SIZE,
    )
    return o.unsqueeze(3)


@cache
def _siso_kernel() -> Callable[..., Tensor] | str:
    """Return the kernel, or why it cannot be loaded."""
    try:
        from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined
    except Exception as error:  # importing it also starts Triton, which has errors of its own
        return f"cannot be imported from mamba_ssm ({error})"
    return mamba3_siso_combined
