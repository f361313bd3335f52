from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.m2rnn import m2rnn_naive
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels import m2rnn_autograd
from nemo_megacpp.mixers.kernels.m2rnn_scan import m2rnn_scan
from tests.mixers.kernels.conftest import run_with_gradients
from tests.mixers.kernels.inputs import m2rnn_inputs

DTYPE = torch.float64


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("per_head", [False, True])
def test_form_matches_reference(hold_to, length, per_head):
    hold_to(m2rnn_naive, m2rnn_scan, m2rnn_inputs(length=length, per_head=per_head), 1e-10)


@pytest.mark.parametrize("checkpoint_every", [1, 5, 37, 100])
def test_checkpoints_change_nothing(hold_to, packed, checkpoint_every):
    options = {"seq_idx": packed([[12, 25], [37]])}
    form_options = {"checkpoint_every": checkpoint_every}
    hold_to(m2rnn_naive, m2rnn_scan, m2rnn_inputs(), 1e-10, options, form_options)


@pytest.mark.parametrize("rows", [[[32, 5], [37]], [[1, 1, 35], [1] * 37]])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_packed_documents(hold_to, packed, rows, clip):
    options = {"seq_idx": packed(rows), "state_gradient_clip": clip}
    hold_to(m2rnn_naive, m2rnn_scan, m2rnn_inputs(), 1e-10, options)


@pytest.mark.parametrize("clip_order", ["before_output", "after_output"])
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_clipped_state_gradient(hold_to, clip_order, clip):
    options = {"state_gradient_clip": clip, "clip_order": clip_order}
    hold_to(m2rnn_naive, m2rnn_scan, m2rnn_inputs(), 1e-10, options)
    hold_to(m2rnn_naive, m2rnn_scan, m2rnn_inputs(), 1e-10, options, {"checkpoint_every": 7})


def test_float32(hold_to, packed):
    tensors = m2rnn_inputs(length=65, heads=4, key=16, value=8, dtype=torch.float32)
    # A contracting W: with a larger one the recurrence is chaotic, and any rounding grows.
    tensors["W"] = 0.3 * tensors["W"]
    options = {"seq_idx": packed([[20, 45], [65]]), "state_gradient_clip": 1.0}
    hold_to(m2rnn_naive, m2rnn_scan, tensors, 1e-5, options, reference_dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-6])
def test_float32_of_small_inputs(hold_to, scale):
    """A new model's keys and values are small: the state is accurate relative to itself."""
    tensors = m2rnn_inputs(length=33, heads=4, key=16, value=8, dtype=torch.float32)
    tensors |= {name: scale * tensors[name] for name in ("q", "k", "v")}
    tensors |= {"W": 0.3 * tensors["W"], "initial_state": scale**2 * tensors["initial_state"]}
    hold_to(m2rnn_naive, m2rnn_scan, tensors, 1e-5, {}, reference_dtype=torch.float64)


def test_tanh_is_accurate_relative_to_itself():
    """Element by element, from what float32 hardly holds to where tanh is 1: W = 0 and f = 0."""
    size = torch.logspace(-37, 38, 3001).float()
    x = torch.cat([-size, size]).view(1, 1, -1, 1)
    zero, one = torch.zeros(1, 1, x.shape[2]), torch.ones(1, 1, 1)
    W = torch.zeros(x.shape[2], 1, 1)
    y, _ = m2rnn_scan(one, one, x, zero, W)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=4e-7, atol=0)


def test_large_inputs_do_not_overflow():
    tensors = m2rnn_inputs(dtype=torch.float32)
    tensors |= {name: 1e15 * tensors[name] for name in ("k", "v", "initial_state")}
    assert all(t.isfinite().all() for t in run_with_gradients(m2rnn_scan, tensors, {}).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "forget"])
def test_a_bad_number_stays_in_its_document(packed, name, bad):
    rows = [[9, 14, 14], [20, 17]]
    mine = torch.zeros(2, 37, dtype=torch.bool)
    mine[0, 9:23] = True
    options = {"seq_idx": packed(rows), "state_gradient_clip": 0.3}
    tensors = m2rnn_inputs(dtype=torch.float32)
    clean = run_with_gradients(m2rnn_scan, tensors, options)
    tensors[name][0, 15] = bad
    found = run_with_gradients(m2rnn_scan, tensors, options)
    honest, _ = m2rnn_naive(**tensors, **options)
    assert torch.equal(found["output 0"].isfinite(), honest.isfinite())
    for tensor in ("output 0", "grad q", "grad k", "grad v", "grad forget"):
        assert torch.equal(found[tensor][~mine], clean[tensor][~mine]), tensor
    for tensor in ("output 1", "grad initial_state"):
        assert torch.equal(found[tensor], clean[tensor]), tensor


def test_gradients_are_finite_differences(packed):
    """Without the reference: the hand-written backward against the function itself."""
    tensors = m2rnn_inputs(batch=2, length=5, heads=2, key=2, value=2)
    seq_idx = packed([[2, 3], [5]])
    leaves = [t.requires_grad_() for t in tensors.values()]

    def function(q, k, v, forget, W, initial_state):
        return m2rnn_scan(q, k, v, forget, W, initial_state=initial_state, seq_idx=seq_idx)

    assert torch.autograd.gradcheck(function, leaves, rtol=1e-5, atol=1e-8)


def published_step(H, q, k, v, f, W):
    """arXiv 2603.14360 for one head and one token: ``H [k, v]`` to the next ``H`` and ``y [v]``."""
    H = f * H + (1 - f) * torch.tanh(H @ W + torch.outer(k, v))
    return H, H.T @ q


class Published(torch.autograd.Function):
    """Head by head and token by token, and back: each token's own vector-Jacobian product, with
    the carried gradient bounded in plain sight. Shares no code with the package."""

    @staticmethod
    def forward(ctx, q, k, v, forget, W, initial_state, starts, clip, clip_order):
        ctx.save_for_backward(q, k, v, forget, W, initial_state)
        ctx.options = starts, clip, clip_order
        y, final, ctx.states = torch.empty_like(v), torch.empty_like(initial_state), {}
        for b, n in itertools.product(range(v.shape[0]), range(v.shape[2])):
            H = initial_state[b, n]
            for t in range(v.shape[1]):
                H = torch.zeros_like(H) if (b, t) in starts else H
                ctx.states[b, n, t] = H
                H, y[b, t, n] = published_step(
                    H, q[b, t], k[b, t], v[b, t, n], forget[b, t, n], W[n]
                )
            final[b, n] = H
        return y, final

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        q, k, v, forget, W, _ = ctx.saved_tensors
        starts, clip, clip_order = ctx.options
        bound = math.inf if clip is None else clip
        grads = [torch.zeros_like(x) for x in ctx.saved_tensors]
        for b, n in itertools.product(range(v.shape[0]), range(v.shape[2])):
            carried = grad_final[b, n]
            for t in reversed(range(v.shape[1])):
                here = (ctx.states[b, n, t], q[b, t], k[b, t], v[b, t, n], forget[b, t, n], W[n])
                leaves = [x.detach().requires_grad_() for x in here]
                with torch.enable_grad():
                    H, y = published_step(*leaves)
                own = torch.outer(q[b, t], grad_y[b, t, n])
                if clip_order == "before_output":
                    total = carried.clamp(-bound, bound) + own
                else:
                    total = (carried + own).clamp(-bound, bound)
                (grad_q,) = torch.autograd.grad(y, leaves[1], grad_y[b, t, n], retain_graph=True)
                others = [leaves[0], *leaves[2:]]
                carried, grad_k, grad_v, grad_f, grad_W = torch.autograd.grad(H, others, total)
                grads[0][b, t] += grad_q
                grads[1][b, t] += grad_k
                grads[2][b, t, n] = grad_v
                grads[3][b, t, n] = grad_f
                grads[4][n] += grad_W
                carried = torch.zeros_like(carried) if (b, t) in starts else carried
            grads[5][b, n] = carried
        return *grads, None, None, None


@pytest.mark.parametrize("function", [m2rnn_naive, m2rnn_scan])
@pytest.mark.parametrize("rows", [None, [[3, 8], [1, 1, 9]]])
@pytest.mark.parametrize("clip_order", ["before_output", "after_output"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_published_equations(hold_to, packed, function, rows, clip_order, clip):
    starts = set()
    if rows is not None:
        for b, lengths in enumerate(rows):
            starts |= {(b, first) for first in itertools.accumulate(lengths[:-1])}
    options = {"state_gradient_clip": clip, "clip_order": clip_order}
    if rows is not None:
        options["seq_idx"] = packed(rows)

    def reference(**t):
        return Published.apply(*t.values(), starts, clip, clip_order)

    tensors = m2rnn_inputs(length=11, heads=2)
    hold_to(reference, lambda **t: function(**t, **options), tensors, 1e-10)


@pytest.mark.parametrize("function", [m2rnn_naive, m2rnn_scan])
def test_two_steps_by_hand(function):
    """One head with K = V = 1 is a scalar recurrence."""
    q, k, v, f, w, h = 0.7, 0.5, -1.2, 0.25, 1.1, 0.4
    scalar = [torch.tensor([[[value]] * 2], dtype=DTYPE) for value in (q, k)]
    y, final = function(
        *scalar,
        torch.full((1, 2, 1, 1), v, dtype=DTYPE),
        torch.full((1, 2, 1), f, dtype=DTYPE),
        torch.full((1, 1, 1), w, dtype=DTYPE),
        initial_state=torch.full((1, 1, 1, 1), h, dtype=DTYPE),
    )
    tanh = torch.tanh
    first = f * h + (1 - f) * tanh(torch.tensor(h * w + k * v, dtype=DTYPE))
    second = f * first + (1 - f) * tanh(first * w + k * v)
    torch.testing.assert_close(y.flatten(), q * torch.stack([first, second]), rtol=1e-13, atol=0)
    torch.testing.assert_close(final.flatten(), second[None], rtol=1e-13, atol=0)


@pytest.mark.parametrize("function", [m2rnn_naive, m2rnn_scan])
@pytest.mark.parametrize("clip_order", ["before_output", "after_output"])
def test_where_the_clip_acts(function, clip_order):
    """W = 0 and f = 1/2 halve the state, so the carried gradient is known."""
    length, clip = 3, 0.1
    t = {
        "q": torch.ones(1, length, 1, dtype=DTYPE),
        "k": torch.zeros(1, length, 1, dtype=DTYPE),
        "v": torch.zeros(1, length, 1, 1, dtype=DTYPE),
        "forget": torch.full((1, length, 1), 0.5, dtype=DTYPE),
        "W": torch.zeros(1, 1, 1, dtype=DTYPE),
    }
    h = torch.ones(1, 1, 1, 1, dtype=DTYPE, requires_grad=True)
    y, _ = function(**t, initial_state=h, state_gradient_clip=clip, clip_order=clip_order)
    (grad,) = torch.autograd.grad(y.sum(), h)
    # Clipped before q·dy = 1 is added: 1, then 0.1 + 1, then 0.1 + 1; after: always 0.1.
    expected = 0.5 * (clip + 1) if clip_order == "before_output" else 0.5 * clip
    assert grad.item() == pytest.approx(expected, rel=1e-12)


def test_a_row_cut_in_two_has_the_same_values_and_gradients():
    t = {k: v.requires_grad_() for k, v in m2rnn_inputs().items()}
    options = {"state_gradient_clip": 0.3}
    y, final = m2rnn_scan(**t, **options)
    parts, state = [], t["initial_state"]
    for window in (slice(0, 20), slice(20, 37)):
        sliced = [t[n][:, window] for n in ("q", "k", "v", "forget")]
        out, state = m2rnn_scan(*sliced, t["W"], initial_state=state, **options)
        parts.append(out)
    joined = torch.cat(parts, dim=1)
    torch.testing.assert_close(joined, y, rtol=1e-12, atol=1e-13)
    whole = torch.autograd.grad(y.square().sum() + final.sum(), list(t.values()))
    halves = torch.autograd.grad(joined.square().sum() + state.sum(), list(t.values()))
    for actual, expected in zip(halves, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slice_of_heads_is_bit_identical(dtype):
    t = m2rnn_inputs(heads=6, key=16, value=4, dtype=dtype)
    part = {
        "q": t["q"],
        "k": t["k"],
        "v": t["v"][:, :, 2:5],
        "forget": t["forget"][:, :, 2:5],
        "W": t["W"][2:5],
        "initial_state": t["initial_state"][:, 2:5],
    }
    y, final = m2rnn_scan(**t)
    part_y, part_final = m2rnn_scan(**part)
    assert torch.equal(y[:, :, 2:5], part_y)
    assert torch.equal(final[:, 2:5], part_final)


def test_groups_of_heads_and_checkpoints_are_bit_identical(monkeypatch, packed):
    """Those of a large model, whose heads are computed in several groups of unequal size."""
    t = m2rnn_inputs(heads=7, key=16, value=4, per_head=True, dtype=torch.float32)
    options = {"seq_idx": packed([[12, 25], [37]])}
    whole = run_with_gradients(m2rnn_scan, t, options)
    of_a_thread = 3 * 2 * 16 * 4 * 4 / torch.get_num_threads()
    monkeypatch.setattr(m2rnn_autograd, "_STATE_BYTES", of_a_thread)
    groups = run_with_gradients(m2rnn_scan, t, options)
    assert all(torch.equal(groups[name], whole[name]) for name in whole)
    sparse = run_with_gradients(m2rnn_scan, t, options | {"checkpoint_every": 5})
    del groups["grad W"], sparse["grad W"]  # a sum over blocks
    assert all(torch.equal(groups[name], sparse[name]) for name in groups)


def test_bfloat16_accumulates_in_float32():
    t = m2rnn_inputs(dtype=torch.bfloat16)
    y, final = m2rnn_scan(**t)
    exact, exact_final = m2rnn_naive(**{k: v.float() for k, v in t.items()})
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(final, exact_final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"W": torch.randn(3, 3, 4)}, "W must"),
        ({"k": torch.randn(2, 36, 4)}, "k must"),
        ({"forget": torch.rand(2, 37)}, "forget"),
        ({"initial_state": torch.randn(2, 3, 3, 4)}, "initial_state"),
        ({"state_gradient_clip": 0.0}, "state_gradient_clip"),
        ({"clip_order": "never"}, "clip_order"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
    ],
)
def test_refusals_name_the_argument(change, word):
    with pytest.raises(UserError, match=word):
        m2rnn_scan(**(m2rnn_inputs() | change))
