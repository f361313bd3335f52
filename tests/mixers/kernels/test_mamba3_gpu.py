"""The adapter to mamba_ssm's Triton kernel: when it may be used, and what it is handed."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_megacpp.mixer_settings import Mamba3Dimensions
from nemo_megacpp.mixers.kernels import mamba3_gpu as adapter
from nemo_megacpp.mixers.kernels.mamba3_scan import mamba3_chunked
from tests.mixers.kernels.conftest import (
    Tensors,
    assert_same,
    oracles_folder,
    run_with_gradients,
)
from tests.mixers.kernels.naive import mamba3_naive
from tests.mixers.kernels.triton_interpreter import peer_kernels

DIMS = Mamba3Dimensions(8, 64, 128, 8, num_angles=32)
RUNS: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cuda")}


def _kernel(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, chunk_size) -> Tensor:
    """mamba_ssm's contract (shapes it asserts; sigmoid and tanh are its own), in torch."""
    batch, length, heads, _ = V.shape
    assert Q.shape == K.shape and heads % Q.shape[2] == 0
    assert ADT.shape == DT.shape == Trap.shape == (batch, heads, length)
    assert Q_bias.shape == K_bias.shape == (heads, Q.shape[-1])
    assert Angles.shape[:3] == (batch, length, heads)
    assert all(t.dtype == torch.float32 for t in (ADT, DT, Q_bias, K_bias, D))
    assert Z is None and chunk_size == 64
    o, _ = mamba3_naive(
        V,
        K.unsqueeze(2),
        Q.unsqueeze(2),
        K_bias.unsqueeze(1),
        Q_bias.unsqueeze(1),
        DT.transpose(1, 2),
        (ADT / DT).transpose(1, 2),
        torch.sigmoid(Trap).transpose(1, 2),
        math.pi * torch.tanh(Angles[:, :, 0]),
        D,
    )
    return o.squeeze(3)


def test_the_kernel_is_handed_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_siso_kernel", lambda: _kernel)
    torch.manual_seed(0)
    batch, length, heads, p, g, n, s = 2, 9, 4, 3, 2, 8, 2
    x, trap = torch.randn(batch, length, heads, p), torch.randn(batch, length, heads)
    B, C = torch.randn(2, batch, length, 1, g, n)
    B_bias, C_bias = torch.randn(2, heads, 1, n)
    dt, A = torch.rand(batch, length, heads) + 0.1, -torch.rand(batch, length, heads)
    theta, D = torch.randn(batch, length, s), torch.randn(heads)
    found = adapter.mamba3_gpu(x, B, C, B_bias, C_bias, dt, A, trap, theta, D)
    expected, _ = mamba3_chunked(
        x, B, C, B_bias, C_bias, dt, A, trap.sigmoid(), math.pi * theta.tanh(), D
    )
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _real_kernel(tensors: Tensors) -> Tensors:
    """In the interpreter's process: mamba_ssm's kernel, through the adapter."""
    peer_kernels("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
    return run_with_gradients(adapter.mamba3_gpu, tensors, {})


def test_the_real_kernel_computes_the_same(interpreter: ProcessPoolExecutor) -> None:
    """mamba_ssm's own kernels, forward and backward, in Triton's interpreter.

    They hold activations and the states between chunks in bf16: 8 bits of mantissa, of which the
    longest chains (67 tokens, more than a chunk) leave about six, 3% of the largest value.
    """
    oracles_folder()
    torch.manual_seed(0)
    batch, length, heads, p, g, n, s = 1, 67, 4, 16, 2, 16, 4
    bf16 = torch.bfloat16
    tensors = {
        "x": torch.randn(batch, length, heads, p).to(bf16),
        "B": torch.randn(batch, length, 1, g, n).to(bf16),
        "C": torch.randn(batch, length, 1, g, n).to(bf16),
        "B_bias": torch.randn(heads, 1, n),
        "C_bias": torch.randn(heads, 1, n),
        "dt": 0.3 * torch.rand(batch, length, heads) + 0.1,
        "A": -torch.rand(batch, length, heads),
        "trap": torch.randn(batch, length, heads).to(bf16),
        "theta": torch.randn(batch, length, s).to(bf16),
        "D": torch.randn(heads),
    }

    def ours(trap: Tensor, theta: Tensor, **t: Tensor) -> Tensor:
        return mamba3_chunked(**t, lam=torch.sigmoid(trap), angle_rate=math.pi * torch.tanh(theta))[
            0
        ]

    exact = {name: t.double() for name, t in tensors.items()}
    expected = run_with_gradients(ours, exact, {})
    assert_same(interpreter.submit(_real_kernel, tensors).result(), expected, 3e-2)


def test_no_reason_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_siso_kernel", lambda: _kernel)
    assert adapter.mamba3_gpu_reason(DIMS, **RUNS) is None
    assert adapter.mamba3_gpu_reason(DIMS, dtype=torch.bfloat16) is None


@pytest.mark.parametrize(
    ("dims", "changes", "reason"),
    [
        ({}, {"device": torch.device("cpu")}, "needs a CUDA device"),
        ({"mimo_rank": 4}, {}, "mamba3_mimo_rank is 4"),
        ({"pairs": "halves"}, {}, "mamba3_pairs is 'halves'"),
        ({"head_dim": 48}, {}, "a power of two from 16; mamba_head_dim is 48"),
        ({"state_dim": 8}, {}, "a power of two from 16; mamba_state_dim is 8"),
        ({"num_angles": 31}, {}, "an even number of angles; this model has 31"),
        ({}, {"dtype": torch.float32}, "bfloat16; the activations are float32"),
        ({}, {"packed": True}, "packed sequences"),
    ],
)
def test_reasons(
    monkeypatch: pytest.MonkeyPatch, dims: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(adapter, "_siso_kernel", lambda: _kernel)
    assert reason in str(adapter.mamba3_gpu_reason(replace(DIMS, **dims), **{**RUNS, **changes}))


def test_a_kernel_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    adapter._siso_kernel.cache_clear()
    assert "cannot be imported" in str(adapter.mamba3_gpu_reason(DIMS, **RUNS))
    adapter._siso_kernel.cache_clear()
