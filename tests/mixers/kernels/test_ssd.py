from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked
from tests.mixers.kernels.naive import ssd_naive


def make(batch=2, length=21, heads=4, head_dim=3, groups=2, state=5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return {
        "x": torch.randn(batch, length, heads, head_dim, dtype=dtype),
        "dt": torch.randn(batch, length, heads, dtype=dtype),
        "A": -torch.rand(heads, dtype=dtype) * 4 - 0.1,
        "B": torch.randn(batch, length, groups, state, dtype=dtype),
        "C": torch.randn(batch, length, groups, state, dtype=dtype),
        "D": torch.randn(heads, dtype=dtype),
        "z": torch.randn(batch, length, heads, head_dim, dtype=dtype),
        "dt_bias": torch.randn(heads, dtype=dtype),
        "initial_states": torch.randn(batch, heads, head_dim, state, dtype=dtype),
    }


OPTIONS = {"dt_softplus": True, "return_final_states": True}


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 21])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_form_matches_reference(hold_to, length, chunk_size):
    form_options = {"chunk_size": chunk_size}
    hold_to(ssd_naive, ssd_chunked, make(length=length), 1e-10, OPTIONS, form_options)


@pytest.mark.parametrize("rows", [[[8, 13], [21]], [[3, 1, 9, 8], [1] * 21], [[16, 5], [7, 9, 5]]])
@pytest.mark.parametrize("chunk_size", [4, 8, 64])
def test_packed_documents(hold_to, packed, rows, chunk_size):
    options = OPTIONS | {"seq_idx": packed(rows)}
    hold_to(ssd_naive, ssd_chunked, make(), 1e-10, options, {"chunk_size": chunk_size})


@pytest.mark.parametrize("absent", [["D"], ["z"], ["dt_bias"], ["initial_states"]])
def test_optional_tensors_may_be_absent(hold_to, absent):
    tensors = {k: v for k, v in make().items() if k not in absent}
    hold_to(ssd_naive, ssd_chunked, tensors, 1e-10, OPTIONS, {"chunk_size": 8})


@pytest.mark.parametrize("absent", [["initial_states"], ["initial_states", "D"]])
@pytest.mark.parametrize("length", [1, 5, 64, 65])
def test_no_state_comes_in_and_none_is_asked_for(hold_to, length, absent):
    """A row of one chunk then computes no states, a longer one does."""
    tensors = {k: v for k, v in make(length=length).items() if k not in absent}
    options = {"dt_softplus": True}
    hold_to(ssd_naive, ssd_chunked, tensors, 1e-10, options, {"chunk_size": 64})


def test_the_last_state_alone_has_the_gradients_of_the_reference():
    grads = []
    for form in (ssd_naive, ssd_chunked):
        t = {k: v.requires_grad_() for k, v in make().items()}
        _, final = form(**t, **OPTIONS)
        names = ("x", "dt", "A", "B", "initial_states")
        grads.append(torch.autograd.grad(final.square().sum(), [t[name] for name in names]))
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 4])
def test_group_layouts_and_per_channel_skip(hold_to, groups):
    tensors = make(groups=groups)
    tensors["D"] = torch.randn(4, 3, dtype=torch.float64)
    tensors["dt"] = tensors["dt"].abs()
    hold_to(ssd_naive, ssd_chunked, tensors, 1e-10, {"return_final_states": True})


def test_float32(hold_to, packed):
    tensors = make(length=130, state=16, head_dim=8, dtype=torch.float32)
    options = OPTIONS | {"seq_idx": packed([[50, 80], [130]])}
    hold_to(ssd_naive, ssd_chunked, tensors, 1e-5, options, reference_dtype=torch.float64)


def quadratic(x, dt, A, B, C):
    """The dual form: one lower-triangular matrix of decays a head, as attention without softmax."""
    per_group = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(per_group, dim=2) for t in (B, C))
    y = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(i + 1):
            decay = torch.exp(A * dt[:, j + 1 : i + 1].sum(dim=1))
            weight = decay * dt[:, j] * (C[:, i] * B[:, j]).sum(dim=-1)
            y[:, i] += weight[..., None] * x[:, j]
    return y


@pytest.mark.parametrize("function", [ssd_naive, ssd_chunked])
def test_agrees_with_the_quadratic_dual(function):
    t = make()
    names = ("x", "dt", "A", "B", "C")
    expected = quadratic(*(t[n].abs() if n == "dt" else t[n] for n in names))
    actual = function(*(t[n].abs() if n == "dt" else t[n] for n in names))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [ssd_naive, ssd_chunked])
def test_options_mean_what_mamba_means(function):
    t = make()
    plain = function(
        t["x"], F.softplus(t["dt"] + t["dt_bias"]), t["A"], t["B"], t["C"],
        initial_states=t["initial_states"],
    )  # fmt: skip
    expected = (plain + t["D"][:, None] * t["x"]) * F.silu(t["z"])
    actual = function(**t, dt_softplus=True)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [ssd_naive, ssd_chunked])
def test_a_packed_row_is_its_documents_alone(function, packed):
    t = make(batch=1)
    lengths = [6, 1, 14]
    y, final = function(**t, **OPTIONS, seq_idx=packed([lengths]))
    start = 0
    for i, length in enumerate(lengths):
        part = {
            k: v[:, start : start + length] if k in ("x", "dt", "B", "C", "z") else v
            for k, v in t.items()
        }
        if i:
            del part["initial_states"]
        alone, alone_final = function(**part, **OPTIONS)
        torch.testing.assert_close(y[:, start : start + length], alone, rtol=1e-10, atol=1e-10)
        start += length
    torch.testing.assert_close(final, alone_final, rtol=1e-10, atol=1e-10)


def test_a_row_cut_in_two_is_the_row():
    t = make()
    y, final = ssd_chunked(**t, **OPTIONS, chunk_size=8)
    parts, state = [], t["initial_states"]
    for window in (slice(0, 9), slice(9, 21)):
        part = {k: v[:, window] if k in ("x", "dt", "B", "C", "z") else v for k, v in t.items()}
        part["initial_states"] = state
        out, state = ssd_chunked(**part, **OPTIONS, chunk_size=8)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_of_heads_is_bit_identical(dtype):
    # 72 tokens fill whole vector registers: ATen rounds the tail of a tensor by another path.
    t = make(length=72, heads=8, head_dim=16, groups=4, state=16, dtype=dtype)
    heads, groups = slice(4, 8), slice(2, 4)
    part = {
        "x": t["x"][:, :, heads],
        "dt": t["dt"][:, :, heads],
        "A": t["A"][heads],
        "B": t["B"][:, :, groups],
        "C": t["C"][:, :, groups],
        "D": t["D"][heads],
        "z": t["z"][:, :, heads],
        "dt_bias": t["dt_bias"][heads],
        "initial_states": t["initial_states"][:, heads],
    }
    y, final = ssd_chunked(**t, **OPTIONS)
    part_y, part_final = ssd_chunked(**part, **OPTIONS)
    assert torch.equal(y[:, :, heads], part_y)
    assert torch.equal(final[:, heads], part_final)


def test_bfloat16_accumulates_in_float32():
    t = make(length=40, dtype=torch.bfloat16)
    y, final = ssd_chunked(**t, **OPTIONS)
    exact, exact_final = ssd_naive(**{k: v.float() for k, v in t.items()}, **OPTIONS)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(final, exact_final, rtol=1e-4, atol=1e-5)


def test_strong_decay_neither_overflows_nor_loses_gradients(hold_to):
    tensors = make(length=64, dtype=torch.float32)
    tensors["A"] = torch.full((4,), -40.0)
    hold_to(ssd_naive, ssd_chunked, tensors, 1e-5, OPTIONS, reference_dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"A": torch.randn(3)}, "A must"),
        ({name: torch.randn(2, 21, 3, 5) for name in "BC"}, "multiple of groups"),
        ({"C": torch.randn(2, 21, 2, 6)}, "C must"),
        ({"D": torch.randn(4, 4)}, "D must"),
        ({"initial_states": torch.randn(2, 4, 5, 3)}, "initial_states"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_refusals_name_the_argument(change, word):
    with pytest.raises(UserError, match=word):
        ssd_chunked(**(make() | change))


def test_one_strong_decay_costs_no_digits(hold_to):
    """A token with dt·A = -1e4: differences of a cumulative sum would be off by 6.6e-4."""
    tensors = make(length=64, state=16, head_dim=8, dtype=torch.float32)
    tensors["dt"] = F.softplus(tensors["dt"]) * 0.1
    tensors["dt"][:, 20] = -1e4 / tensors["A"]
    del tensors["dt_bias"]
    options = {"return_final_states": True}
    hold_to(ssd_naive, ssd_chunked, tensors, 2e-6, options, reference_dtype=torch.float64)


@pytest.mark.parametrize("chunk_size", [8, 64])
def test_checkpointed_gradients_are_the_same_bits(chunk_size):
    leaves = [t.requires_grad_() for t in make(length=40, dtype=torch.float32).values()]
    names = list(make())

    def form(*values):
        inputs = dict(zip(names, values, strict=True))
        return ssd_chunked(**inputs, dt_softplus=True, chunk_size=chunk_size)

    expected = torch.autograd.grad(form(*leaves).square().sum(), leaves[:3])
    again = torch.utils.checkpoint.checkpoint(form, *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), leaves[:3]), expected, strict=True):
        assert torch.equal(a, b)
