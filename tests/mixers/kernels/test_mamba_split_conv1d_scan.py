from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo_megacpp.mixers.kernels.mamba_split_conv1d_scan import mamba_split_conv1d_scan
from tests.mixers.kernels.naive import causal_conv1d_naive, ssd_naive

HEADS, HEAD_DIM, GROUPS, STATE = 4, 3, 2, 5
INNER, DOUBLED = HEADS * HEAD_DIM, 2 * GROUPS * STATE


def make(batch=2, length=19, dtype=torch.float64):
    torch.manual_seed(1)
    return {
        "zxbcdt": torch.randn(batch, length, 2 * INNER + DOUBLED + HEADS, dtype=dtype),
        "conv1d_weight": torch.randn(INNER + DOUBLED, 4, dtype=dtype),
        "conv1d_bias": torch.randn(INNER + DOUBLED, dtype=dtype),
        "dt_bias": torch.randn(HEADS, dtype=dtype),
        "A": -torch.rand(HEADS, dtype=dtype) - 0.1,
        "D": torch.randn(HEADS, dtype=dtype),
        "initial_states": torch.randn(batch, HEADS, HEAD_DIM, STATE, dtype=dtype),
    }


OPTIONS = {"headdim": HEAD_DIM, "ngroups": GROUPS, "return_final_states": True}


def reference(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, *, seq_idx=None, initial_states=None,
    headdim, ngroups, return_final_states,
):  # fmt: skip
    """What the fused kernel computes without a norm weight, from the references of its parts."""
    z = zxbcdt[..., :INNER]
    xBC = zxbcdt[..., INNER : 2 * INNER + DOUBLED]
    dt = zxbcdt[..., 2 * INNER + DOUBLED :]
    xBC = causal_conv1d_naive(xBC, conv1d_weight, conv1d_bias, "silu", seq_idx)
    x, B, C = (
        xBC[..., :INNER],
        xBC[..., INNER : INNER + DOUBLED // 2],
        xBC[..., INNER + DOUBLED // 2 :],
    )
    batch, length, _ = zxbcdt.shape
    y, final = ssd_naive(
        x.reshape(batch, length, HEADS, HEAD_DIM),
        F.softplus(dt + dt_bias),
        A,
        B.reshape(batch, length, GROUPS, STATE),
        C.reshape(batch, length, GROUPS, STATE),
        D=D,
        seq_idx=seq_idx,
        initial_states=initial_states,
        return_final_states=True,
    )
    return y.reshape(batch, length, INNER) * F.silu(z), final


@pytest.mark.parametrize("rows", [None, [[19], [19]], [[4, 15], [2, 1, 16]]])
def test_matches_its_parts(hold_to, packed, rows):
    options = OPTIONS | {"seq_idx": None if rows is None else packed(rows)}
    hold_to(reference, mamba_split_conv1d_scan, make(), 1e-10, options, {"chunk_size": 8})


@pytest.mark.parametrize("length", [1, 3])
def test_short_rows(hold_to, length):
    tensors = make(length=length)
    hold_to(reference, mamba_split_conv1d_scan, tensors, 1e-10, OPTIONS, {"chunk_size": 8})


def test_called_as_megatron_calls_it():
    t = make()
    del t["initial_states"]
    expected, _ = reference(**t, **OPTIONS)
    args = [t[k] for k in ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A")]
    actual = mamba_split_conv1d_scan(
        *args, D=t["D"], chunk_size=128, activation="silu", headdim=HEAD_DIM, ngroups=GROUPS,
        norm_before_gate=False, seq_idx=None,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    wide = t["D"][:, None].expand(HEADS, HEAD_DIM)
    actual = mamba_split_conv1d_scan(*args, D=wide, chunk_size=128, headdim=None, ngroups=GROUPS)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_mixed_dtypes_of_a_bf16_mixer():
    t = make(dtype=torch.bfloat16)
    for name in ("dt_bias", "A", "D"):
        t[name] = t[name].float()
    y, _ = mamba_split_conv1d_scan(**t, **OPTIONS, chunk_size=8)
    exact, _ = reference(**{k: v.double() for k, v in t.items()}, **OPTIONS)
    assert y.dtype == torch.bfloat16
    # Rounded twice to 8 bits of mantissa: after the convolution and at the end.
    assert ((y.double() - exact).abs().max() / exact.abs().max()).item() < 2**-7


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rmsnorm_weight": torch.ones(INNER)}, "rmsnorm_weight"),
        ({"outproj_weight": torch.ones(1, INNER)}, "outproj_weight"),
        ({"dt_limit": (0.0, 1.0)}, "dt_limit"),
        ({"activation": "swish2"}, "activation"),
        ({"headdim": None}, "headdim"),
        ({"ngroups": 3}, "conv1d_weight"),
        ({"zxbcdt": torch.randn(2, 19, 7)}, "zxbcdt"),
    ],
)
def test_refuses_what_the_mixer_never_passes(change, word):
    with pytest.raises(ValueError, match=word):
        mamba_split_conv1d_scan(**(make() | {"chunk_size": 8} | OPTIONS | change))
