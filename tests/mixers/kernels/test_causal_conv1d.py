from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_state,
)
from tests.mixers.kernels.naive import causal_conv1d_naive


def make(batch=2, length=13, channels=5, width=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return {
        "x": torch.randn(batch, length, channels, dtype=dtype),
        "weight": torch.randn(channels, width, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
        "initial_state": torch.randn(batch, channels, width - 1, dtype=dtype),
    }


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("width", [2, 4])
def test_form_matches_reference(hold_to, activation, length, width):
    tensors = make(length=length, width=width)
    options = {"activation": activation}
    hold_to(causal_conv1d_naive, causal_conv1d, tensors, 1e-12, options)


@pytest.mark.parametrize("optional", [["bias"], ["initial_state"], ["bias", "initial_state"]])
def test_optional_tensors_may_be_absent(hold_to, optional):
    tensors = {k: v for k, v in make().items() if k not in optional}
    hold_to(causal_conv1d_naive, causal_conv1d, tensors, 1e-12, {"activation": "silu"})


@pytest.mark.parametrize("rows", [[[1, 2, 10], [13]], [[4, 4, 5], [1] * 13]])
def test_packed_documents(hold_to, packed, rows):
    options = {"activation": "silu", "seq_idx": packed(rows)}
    hold_to(causal_conv1d_naive, causal_conv1d, make(), 1e-12, options)


def test_one_tap_sees_its_own_token_only(hold_to, packed):
    tensors = {k: v for k, v in make(width=1).items() if k != "initial_state"}
    options = {"activation": "silu", "seq_idx": packed([[1, 2, 10], [13]])}
    hold_to(causal_conv1d_naive, causal_conv1d, tensors, 1e-12, options)


def test_no_tap_is_refused():
    with pytest.raises(UserError, match="at least one tap"):
        causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 0))


def test_float32(hold_to, packed):
    tensors = make(length=33, channels=17, dtype=torch.float32)
    options = {"activation": "silu", "seq_idx": packed([[7, 26], [33]])}
    hold_to(causal_conv1d_naive, causal_conv1d, tensors, 2e-6, options, None, torch.float64)


@pytest.mark.parametrize("function", [causal_conv1d_naive, causal_conv1d])
def test_agrees_with_torch_conv1d(function):
    t = make()
    expected = F.conv1d(
        F.pad(t["x"].transpose(1, 2), (3, 0)), t["weight"][:, None], t["bias"], groups=5
    ).transpose(1, 2)
    torch.testing.assert_close(
        function(t["x"], t["weight"], t["bias"]), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("function", [causal_conv1d_naive, causal_conv1d])
def test_a_packed_row_is_its_documents_alone(function, packed):
    t = make(batch=1)
    first = t["initial_state"]
    y = function(t["x"], t["weight"], t["bias"], "silu", packed([[2, 5, 6]]), first)
    alone = [
        function(x, t["weight"], t["bias"], "silu", None, first if i == 0 else None)
        for i, x in enumerate(t["x"].split([2, 5, 6], dim=1))
    ]
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cut", [1, 2, 5, 12])
@pytest.mark.parametrize("rows", [None, [[5, 8], [11, 2]]])
def test_a_row_cut_in_two_is_the_row(packed, cut, rows):
    t = make()
    seq_idx = None if rows is None else packed(rows)
    halves = [None, None] if seq_idx is None else [seq_idx[:, :cut], seq_idx[:, cut:]]
    whole = causal_conv1d(t["x"], t["weight"], t["bias"], "silu", seq_idx, t["initial_state"])
    head, tail = t["x"][:, :cut], t["x"][:, cut:]
    state = causal_conv1d_state(head, 4, halves[0], t["initial_state"])
    if seq_idx is not None:
        # The next segment cannot see that a document ends exactly at the cut.
        state = state * (seq_idx[:, cut - 1] == seq_idx[:, cut])[:, None, None]
    parts = [
        causal_conv1d(head, t["weight"], t["bias"], "silu", halves[0], t["initial_state"]),
        causal_conv1d(tail, t["weight"], t["bias"], "silu", halves[1], state),
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_a_slice_of_channels_is_bit_identical():
    t = make(channels=24, dtype=torch.float32)
    whole = causal_conv1d(t["x"], t["weight"], t["bias"], "silu")
    part = causal_conv1d(t["x"][..., 5:13], t["weight"][5:13], t["bias"][5:13], "silu")
    assert torch.equal(whole[..., 5:13], part)


def test_bfloat16_accumulates_in_float32():
    t = make(dtype=torch.bfloat16)
    y = causal_conv1d(**t, activation="silu")
    exact = causal_conv1d_naive(**{k: v.float() for k, v in t.items()}, activation="silu")
    assert y.dtype == torch.bfloat16
    # Only the output is rounded to 8 bits of mantissa: half an ulp.
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"activation": "gelu"}, "activation"),
        ({"weight": torch.randn(4, 4)}, "weight"),
        ({"bias": torch.randn(4)}, "bias"),
        ({"initial_state": torch.randn(2, 5, 4)}, "initial_state"),
        ({"seq_idx": torch.zeros(2, 12, dtype=torch.int32)}, "seq_idx"),
        ({"seq_idx": torch.zeros(2, 13)}, "seq_idx"),
    ],
)
def test_refusals_name_the_argument(change, word):
    with pytest.raises(UserError, match=word):
        causal_conv1d(**(make() | change))
