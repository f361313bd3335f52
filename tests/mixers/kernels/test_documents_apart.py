"""A NaN or Inf in one document of a packed row changes no bit of another: values, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d
from nemo_megacpp.mixers.kernels.mamba3_scan import mamba3_chunked
from nemo_megacpp.mixers.kernels.mamba_split_conv1d_scan import mamba_split_conv1d_scan
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked

# The middle document lies inside a chunk of 8, shares two with its neighbours, or spans several.
LENGTHS = [[5, 2, 14], [6, 5, 10], [3, 17, 1]]
HEADS, GROUPS = 4, 2


def conv(rank=1):
    tensors = {"x": torch.randn(2, 21, 5)}
    fixed = {"weight": torch.randn(5, 4), "bias": torch.randn(5), "activation": "silu"}
    return lambda **t: causal_conv1d(**t, **fixed), tensors


def ssd(rank=1):
    tensors = {
        "x": torch.randn(2, 21, HEADS, 3),
        "dt": torch.randn(2, 21, HEADS),
        "B": torch.randn(2, 21, GROUPS, 5),
        "C": torch.randn(2, 21, GROUPS, 5),
        "z": torch.randn(2, 21, HEADS, 3),
    }
    fixed = {
        "A": -torch.rand(HEADS) - 0.1,
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS),
        "initial_states": torch.randn(2, HEADS, 3, 5),
        "dt_softplus": True,
        "chunk_size": 8,
    }
    return lambda **t: ssd_chunked(**t, **fixed), tensors


def split_scan(rank=1):
    inner, doubled = HEADS * 3, 2 * GROUPS * 5
    tensors = {"zxbcdt": torch.randn(2, 21, 2 * inner + doubled + HEADS)}
    fixed = {
        "conv1d_weight": torch.randn(inner + doubled, 4),
        "conv1d_bias": torch.randn(inner + doubled),
        "dt_bias": torch.randn(HEADS),
        "A": -torch.rand(HEADS) - 0.1,
        "D": torch.randn(HEADS),
        "chunk_size": 8,
        "headdim": 3,
        "ngroups": GROUPS,
    }
    return lambda **t: mamba_split_conv1d_scan(**t, **fixed), tensors


def mamba3(rank=1):
    tensors = {
        "x": torch.randn(2, 21, HEADS, 3),
        "B": torch.randn(2, 21, rank, GROUPS, 8),
        "C": torch.randn(2, 21, rank, GROUPS, 8),
        "dt": F.softplus(torch.randn(2, 21, HEADS)),
        "A": -F.softplus(torch.randn(2, 21, HEADS)),
        "lam": torch.rand(2, 21, HEADS),
        "angle_rate": math.pi * torch.tanh(torch.randn(2, 21, 2)),
    }
    fixed = {
        "B_bias": torch.randn(HEADS, rank, 8),
        "C_bias": torch.randn(HEADS, rank, 8),
        "D": torch.randn(HEADS),
        "mimo_x": torch.randn(HEADS, rank, 3),
        "chunk_size": 8,
    }
    return lambda **t: mamba3_chunked(**t, **fixed)[0], tensors


def mamba3_mimo():
    return mamba3(rank=2)


FORMS = [conv, ssd, split_scan, mamba3, mamba3_mimo]


def values_and_gradients(form, tensors, weight, seq_idx):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y = form(**leaves, seq_idx=seq_idx)
    gradients = torch.autograd.grad(y, list(leaves.values()), weight.expand_as(y))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("make", FORMS)
def test_one_document_does_not_reach_another(packed, make, poison, lengths):
    torch.manual_seed(0)
    form, tensors = make()
    seq_idx = packed([lengths, [21]])
    weight = torch.randn_like(form(**tensors, seq_idx=seq_idx))
    clean = values_and_gradients(form, tensors, weight, seq_idx)
    bad = slice(lengths[0], lengths[0] + lengths[1])
    for name in (*tensors, "weight"):
        poisoned = {k: t.clone() for k, t in tensors.items()}
        poisoned["weight"] = weight.clone()
        poisoned[name][0, bad] = poison
        found = values_and_gradients(form, poisoned, poisoned.pop("weight"), seq_idx)
        for what, value in found.items():
            for row, tokens in (
                (0, slice(0, bad.start)),
                (0, slice(bad.stop, None)),
                (1, slice(0, 21)),
            ):
                assert torch.equal(value[row, tokens], clean[what][row, tokens]), (name, what)
        assert not found["y"][0, bad].isfinite().all() or name == "weight"
