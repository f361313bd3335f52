from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.mamba3_scan import mamba3_chunked
from nemo_megacpp.mixers.kernels.mamba3_state import Mamba3State, negative_decay_rate
from tests.mixers.kernels.naive import mamba3_naive

STATE_NAMES = tuple(f"state_{field}" for field in Mamba3State._fields)
PER_TOKEN = ("x", "B", "C", "dt", "A", "lam", "angle_rate")


def make(
    batch=2, length=21, heads=4, head_dim=3, rank=1, groups=2, state=8, angles=2,
    dtype=torch.float64, seed=0,
):  # fmt: skip
    torch.manual_seed(seed)
    t = {
        "x": torch.randn(batch, length, heads, head_dim),
        "B": torch.randn(batch, length, rank, groups, state),
        "C": torch.randn(batch, length, rank, groups, state),
        "B_bias": torch.randn(heads, rank, state),
        "C_bias": torch.randn(heads, rank, state),
        "dt": F.softplus(torch.randn(batch, length, heads) - 0.5),
        "A": -F.softplus(torch.randn(batch, length, heads)),
        "lam": torch.rand(batch, length, heads),
        "angle_rate": math.pi * torch.tanh(torch.randn(batch, length, angles)),
        "D": torch.randn(heads),
        "state_ssm": torch.randn(batch, heads, head_dim, state),
        "state_k": torch.randn(batch, heads, rank, state),
        "state_v": torch.randn(batch, heads, head_dim),
        "state_angle": torch.rand(batch, heads, angles) * 2 * math.pi,
    }
    if rank > 1:
        t["mimo_x"] = torch.randn(heads, rank, head_dim)
    return {name: tensor.to(dtype) for name, tensor in t.items()}


def flat(function):
    """Take and return the parts of the state one by one, so that every gradient is compared."""

    def call(**arguments):
        parts = [arguments.pop(name, None) for name in STATE_NAMES]
        state = None if parts[0] is None else Mamba3State(*parts)
        outputs, final = function(**arguments, initial_state=state)
        return (outputs, *final)

    return call


NAIVE, CHUNKED = flat(mamba3_naive), flat(mamba3_chunked)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 8), (7, 8), (8, 8), (21, 8), (21, None)])
def test_form_matches_reference(hold_to, rank, pairs, length, chunk_size):
    tensors = make(length=length, rank=rank)
    hold_to(NAIVE, CHUNKED, tensors, 1e-10, {"pairs": pairs}, {"chunk_size": chunk_size})


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("rows", [[[8, 13], [21]], [[1, 3, 9, 8], [1] * 21], [[16, 5], [7, 9, 5]]])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_packed_documents(hold_to, packed, rank, rows, chunk_size):
    options = {"seq_idx": packed(rows)}
    hold_to(NAIVE, CHUNKED, make(rank=rank), 1e-10, options, {"chunk_size": chunk_size})


@pytest.mark.parametrize(("groups", "angles"), [(1, 4), (4, 1)])
def test_layouts_without_an_initial_state(hold_to, groups, angles):
    tensors = make(groups=groups, angles=angles)
    tensors = {k: v for k, v in tensors.items() if k not in STATE_NAMES}
    hold_to(NAIVE, CHUNKED, tensors, 1e-10, None, {"chunk_size": 8})


@pytest.mark.parametrize("rank", [1, 2])
def test_float32(hold_to, packed, rank):
    tensors = make(length=130, rank=rank, head_dim=8, state=16, dtype=torch.float32)
    options = {"seq_idx": packed([[50, 80], [130]])}
    hold_to(NAIVE, CHUNKED, tensors, 1e-5, options, reference_dtype=torch.float64)


def as_complex(x, pairs):
    """State channels as complex numbers, one for each pair that may turn together."""
    if pairs == "halves":
        return torch.complex(*x.chunk(2, dim=-1))
    return torch.complex(x[..., 0::2], x[..., 1::2])


def quadratic(x, B, C, B_bias, C_bias, dt, A, lam, angle_rate, D, *, mimo_x, pairs):
    """Every pair of tokens by itself: Euler's formula for the angle, a product for the decay."""
    batch, length, heads, _ = x.shape
    repeat = heads // B.shape[3]
    k = B.repeat_interleave(repeat, dim=3).transpose(2, 3) + B_bias  # [b, l, h, r, n]
    q = C.repeat_interleave(repeat, dim=3).transpose(2, 3) + C_bias
    k, q = as_complex(k, pairs), as_complex(q, pairs)
    turn = torch.zeros(batch, length, heads, k.shape[-1], dtype=x.dtype)
    turn[..., : angle_rate.shape[-1]] = angle_rate[:, :, None] * dt[..., None]
    v = x[:, :, :, None] * mimo_x
    o = D[:, None, None] * v
    for i in range(length):
        for j in range(i + 1):
            between = torch.exp(1j * turn[:, j + 1 : i + 1].sum(dim=1))[:, :, None]
            dots = torch.einsum("bhrn,bhsn->bhrs", q[:, i] * between, k[:, j].conj()).real
            steps = dt[:, j] * lam[:, j]
            if j < i:
                # The trapezoid's other side: the interval from j to j + 1 begins at token j.
                steps = steps + dt[:, j + 1] * (1 - lam[:, j + 1])
            decay = torch.exp((A * dt)[:, j + 1 : i + 1].sum(dim=1))
            weight = (steps * decay)[..., None, None] * dots
            o[:, i] += torch.einsum("bhrs,bhsp->bhrp", weight, v[:, j])
    return o


@pytest.mark.parametrize("function", [mamba3_naive, mamba3_chunked])
@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize("rank", [1, 2])
def test_agrees_with_the_quadratic_form(function, pairs, rank):
    t = {k: v for k, v in make(rank=rank).items() if k not in STATE_NAMES}
    ones = torch.ones(4, 1, 3, dtype=torch.float64)
    expected = quadratic(**({"mimo_x": ones} | t), pairs=pairs)
    actual, _ = function(**t, pairs=pairs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [NAIVE, CHUNKED])
def test_a_packed_row_is_its_documents_alone(function, packed):
    t, lengths = make(batch=1, rank=2), [6, 1, 14]
    y, *final = function(**t, seq_idx=packed([lengths]))
    start = 0
    for i, length in enumerate(lengths):
        window = slice(start, start + length)
        part = {k: v[:, window] if k in PER_TOKEN else v for k, v in t.items()}
        if i:
            part = {k: v for k, v in part.items() if k not in STATE_NAMES}
        alone, *alone_final = function(**part)
        torch.testing.assert_close(y[:, window], alone, rtol=1e-10, atol=1e-10)
        start += length
    torch.testing.assert_close(final, alone_final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize("cut", [1, 9, 20])
def test_a_row_cut_in_two_has_the_same_values_and_gradients(pairs, cut):
    t = {k: v.requires_grad_() for k, v in make(rank=2).items()}
    whole = CHUNKED(**t, pairs=pairs, chunk_size=8)
    parts, state = [], [t[name] for name in STATE_NAMES]
    for window in (slice(0, cut), slice(cut, 21)):
        part = {k: v[:, window] if k in PER_TOKEN else v for k, v in t.items()}
        part.update(zip(STATE_NAMES, state, strict=True))
        out, *state = CHUNKED(**part, pairs=pairs, chunk_size=8)
        parts.append(out)
    halves = (torch.cat(parts, dim=1), *state)
    for actual, expected in zip(halves, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    losses = [sum(part.square().sum() for part in result) for result in (halves, whole)]
    gradients = [torch.autograd.grad(loss, list(t.values())) for loss in losses]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_angles_stay_exact_over_a_long_row():
    """A constant turn for thousands of tokens: float32 would have lost the angle."""
    length, angle_step = 4001, float(torch.tensor(1.7))
    t = {k: v.float() for k, v in make(batch=1, length=length, heads=1, groups=1).items()}
    t = {k: v for k, v in t.items() if k not in STATE_NAMES}
    t["dt"] = torch.ones(1, length, 1)
    t["angle_rate"] = torch.full((1, length, 2), angle_step)
    _, state = mamba3_chunked(**t)
    expected = math.fmod(length * angle_step, 2 * math.pi)
    assert state.angle.flatten().tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_a_slice_of_heads_is_bit_identical():
    t = make(length=64, heads=8, head_dim=16, groups=4, state=16, rank=2, dtype=torch.float32)
    part = dict(t)
    for name in ("x", "dt", "A", "lam"):
        part[name] = t[name][:, :, 4:].contiguous()
    for name in ("B", "C"):
        part[name] = t[name][:, :, :, 2:].contiguous()
    for name in ("B_bias", "C_bias", "D", "mimo_x"):
        part[name] = t[name][4:].contiguous()
    for name in STATE_NAMES:
        part[name] = t[name][:, 4:].contiguous()
    y, *final = CHUNKED(**t)
    part_y, *part_final = CHUNKED(**part)
    assert torch.equal(y[:, :, 4:], part_y)
    for whole, sliced in zip(final, part_final, strict=True):
        assert torch.equal(whole[:, 4:], sliced)


def test_bfloat16_accumulates_in_float32():
    t = make(length=40, rank=2, dtype=torch.bfloat16)
    y, *final = CHUNKED(**t)
    exact, *exact_final = NAIVE(**{k: v.double() for k, v in t.items()})
    assert y.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in final)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)
    for actual, expected in zip(final, exact_final, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_decay_activations():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, -1e6], dtype=torch.float64, requires_grad=True)
    soft = negative_decay_rate(x, 1e-4)
    tail = negative_decay_rate(x, 1e-4, "heavy_tail")
    torch.testing.assert_close(soft[:5], -torch.log1p(x[:5].exp()), rtol=1e-12, atol=0)
    expected = [-1 / 4, -1 / 2, -1.0, -2.0, -3.0, -1e-4]
    torch.testing.assert_close(tail, torch.tensor(expected).double(), rtol=1e-7, atol=0)
    (gradient,) = torch.autograd.grad(tail.sum(), x)
    expected = [-1 / 16, -1 / 4, -1.0, -1.0, -1.0, 0.0]
    torch.testing.assert_close(gradient, torch.tensor(expected).double(), rtol=1e-7, atol=0)
    assert negative_decay_rate(x.bfloat16()).dtype == torch.float32
    with pytest.raises(UserError, match="heavy_tail"):
        negative_decay_rate(x, 1e-4, "relu")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({name: torch.randn(2, 21, 1, 3, 8) for name in "BC"}, "multiple of groups"),
        ({"C": torch.randn(2, 21, 2, 2, 8)}, "C must"),
        ({"B_bias": torch.randn(4, 8)}, "B_bias"),
        ({"lam": torch.rand(2, 21, 3)}, "lam"),
        ({"angle_rate": torch.rand(2, 21, 5)}, "at most 4"),
        ({"pairs": "thirds"}, "pairs"),
        ({"D": torch.randn(4, 3)}, "D must"),
        ({"mimo_x": torch.randn(4, 2, 3)}, "mimo_x"),
        ({"B": torch.randn(2, 21, 2, 2, 8), "C": torch.randn(2, 21, 2, 2, 8),
          "B_bias": torch.randn(4, 2, 8), "C_bias": torch.randn(4, 2, 8)}, "mimo_x"),
        ({"state_angle": torch.rand(2, 4, 3)}, "initial_state.angle"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(change, word):
    with pytest.raises(UserError, match=word):
        CHUNKED(**(make() | change))


def test_one_strong_decay_costs_no_digits(hold_to):
    tensors = make(length=64, head_dim=8, state=16, dtype=torch.float32)
    tensors["dt"] = tensors["dt"] * 0.1
    tensors["A"][:, 20] = -1e4 / tensors["dt"][:, 20]
    hold_to(NAIVE, CHUNKED, tensors, 2e-6, reference_dtype=torch.float64)
