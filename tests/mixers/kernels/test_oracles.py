"""The Mamba kernels against references that others wrote: mamba-ssm's and causal-conv1d's.

A reference that takes no ``seq_idx`` is run on every document of a packed row by itself. Where one
computes partly in float32 the tolerance is 1e-6 or 1e-5 of the largest value, else 1e-10.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d, causal_conv1d_state
from nemo_megacpp.mixers.kernels.gated_rms_norm import gated_rms_norm
from nemo_megacpp.mixers.kernels.mamba3_scan import mamba3_chunked
from nemo_megacpp.mixers.kernels.mamba3_state import Mamba3State
from nemo_megacpp.mixers.kernels.mamba_split_conv1d_scan import mamba_split_conv1d_scan
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked
from tests.mixers.kernels.conftest import assert_same, oracles_folder, run_with_gradients
from tests.mixers.kernels.triton_interpreter import peer_kernels

DTYPE = torch.float64
ROWS = [None, [[8, 13], [21]], [[1, 3, 9, 8], [20, 1]]]


def rand(*shape):
    """Normal numbers in float64 that float32 holds as well."""
    return torch.randn(*shape).to(DTYPE)


def documents(rows, batch, length):
    """Yield ``(row, start, stop)`` of every document."""
    for row, lengths in enumerate([[length]] * batch if rows is None else rows):
        start = 0
        for count in lengths:
            yield row, start, start + count
            start += count


def by_document(rows, batch, length, one):
    """Join ``one(row, tokens, is_first)`` of all documents: ``[b, l, ...]`` and final states."""
    outputs = [[] for _ in range(batch)]
    finals = [None] * batch
    for row, start, stop in documents(rows, batch, length):
        out, finals[row] = one(slice(row, row + 1), slice(start, stop), start == 0)
        outputs[row].append(out)
    joined = torch.cat([torch.cat(parts, dim=1) for parts in outputs])
    if isinstance(finals[0], tuple):
        return joined, *(torch.cat(parts) for parts in zip(*finals, strict=True))
    return joined, torch.cat(finals)


# -- the convolution -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(oracles, hold_to, packed, rows, activation):
    torch.manual_seed(0)
    tensors = {
        "x": rand(2, 21, 5),
        "weight": rand(5, 4),
        "bias": rand(5),
        "initial_state": rand(2, 5, 3),
    }

    def reference(x, weight, bias, initial_state):
        def one(row, tokens, is_first):
            window = initial_state[row] if is_first else torch.zeros_like(initial_state[row])
            out, final = oracles.causal_conv1d_ref(
                x[row, tokens].transpose(1, 2), weight, bias, window, True, None, activation
            )
            return out.transpose(1, 2), final

        return by_document(rows, 2, 21, one)

    def ours(x, weight, bias, initial_state):
        seq_idx = None if rows is None else packed(rows)
        y = causal_conv1d(x, weight, bias, activation, seq_idx, initial_state)
        return y, causal_conv1d_state(x, 4, seq_idx, initial_state)

    hold_to(reference, ours, tensors, 1e-12)


def test_final_window_of_packed_rows(oracles, packed):
    """causal-conv1d's own reference for packed rows; it starts every document from zero."""
    x = rand(1, 13, 5)
    for lengths in ([6, 7], [11, 2], [12, 1]):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        expected = oracles.causal_conv1d_varlen_states_ref(x[0], ends, 3)[-1:]
        assert torch.equal(causal_conv1d_state(x, 4, packed([lengths])), expected)


# -- Mamba-2 ---------------------------------------------------------------------------------------


def ssd_tensors(heads=4, groups=2):
    torch.manual_seed(1)
    return {
        "x": rand(2, 21, heads, 3),
        "dt": rand(2, 21, heads),
        "A": -torch.rand(heads).to(DTYPE) - 0.1,
        "B": rand(2, 21, groups, 5),
        "C": rand(2, 21, groups, 5),
        "D": rand(heads),
        "z": rand(2, 21, heads, 3),
        "dt_bias": rand(heads),
        "initial_states": rand(2, heads, 3, 5),
    }


@pytest.mark.parametrize("rows", ROWS)
def test_ssd_with_states_and_packs(oracles, hold_to, packed, rows):
    """The paper's Listing 1 takes and returns states, in float64."""

    def reference(x, dt, A, B, C, D, z, dt_bias, initial_states):
        step = F.softplus(dt + dt_bias)
        B, C = (t.repeat_interleave(2, dim=2) for t in (B, C))

        def one(row, tokens, is_first):
            state = initial_states[row] if is_first else torch.zeros_like(initial_states[row])
            length = tokens.stop - tokens.start
            block = next(n for n in (7, 5, 4, 3, 2, 13, 1) if length % n == 0)
            pick = step[row, tokens]
            return oracles.ssd_minimal_discrete(
                x[row, tokens] * pick[..., None],
                A * pick,
                B[row, tokens],
                C[row, tokens],
                block,
                state[:, None],
            )

        y, final = by_document(rows, 2, 21, one)
        return (y + D[:, None] * x) * F.silu(z), final

    options = {"dt_softplus": True, "return_final_states": True, "chunk_size": 8}
    if rows is not None:
        options["seq_idx"] = packed(rows)
    hold_to(reference, lambda **t: ssd_chunked(**t, **options), ssd_tensors(), 1e-10)


def _real_ssd(tensors, options):
    """In the interpreter's process: what Megatron's MambaMixer runs on a GPU."""
    kernels = peer_kernels("mamba_ssm.ops.triton.ssd_combined")
    return run_with_gradients(kernels.mamba_chunk_scan_combined, tensors, options)


def test_ssd_is_what_the_kernels_compute(interpreter, packed):
    """mamba_ssm's own kernels, forward and backward, with packs and states of their own.

    They give an initial state to document 0 alone; we, to the first document whatever its number.
    """
    oracles_folder()
    seq_idx = packed([[8, 13], [21]])
    seq_idx = seq_idx - seq_idx[:, :1]
    tensors = {name: t.float() for name, t in ssd_tensors(2, 1).items()}
    options = {"dt_softplus": True, "return_final_states": True, "seq_idx": seq_idx}
    exact = {name: t.double() for name, t in tensors.items()}
    expected = run_with_gradients(ssd_chunked, exact, options | {"chunk_size": 8})
    found = interpreter.submit(_real_ssd, tensors, options | {"chunk_size": 16}).result()
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("absent", [(), ("z",), ("D", "dt_bias")])
def test_ssd_options(oracles, hold_to, absent):
    tensors = {k: v for k, v in ssd_tensors().items() if k not in ("initial_states", *absent)}

    def reference(**t):
        return oracles.ssd_chunk_scan_combined_ref(**t, chunk_size=3, dt_softplus=True)

    # The reference takes dt through float32, which rounds its gradient alone.
    def ours(**t):
        return ssd_chunked(**t, dt_softplus=True, chunk_size=8)

    hold_to(reference, ours, tensors, 1e-6)


def test_ssd_as_a_selective_scan(oracles, hold_to):
    """Mamba-1's reference, a loop over tokens, with one A for all channels of a head."""
    tensors = {k: v for k, v in ssd_tensors().items() if k != "initial_states"}
    heads, width = tensors["x"].shape[2:]

    def reference(x, dt, A, B, C, D, z, dt_bias):
        def channels(t):
            return t.flatten(2).transpose(1, 2)

        y, final = oracles.selective_scan_ref(
            channels(x),
            channels(dt[..., None].expand_as(x)),
            A.float().repeat_interleave(width)[:, None].expand(-1, B.shape[-1]),
            B.permute(0, 2, 3, 1),
            C.permute(0, 2, 3, 1),
            D.repeat_interleave(width),
            channels(z),
            dt_bias.repeat_interleave(width),
            delta_softplus=True,
            return_last_state=True,
        )
        y = y.transpose(1, 2).unflatten(2, (heads, width))
        return y, final.unflatten(1, (heads, width))

    def ours(**t):
        return ssd_chunked(**t, dt_softplus=True, return_final_states=True, chunk_size=8)

    hold_to(reference, ours, tensors, 1e-5)


@pytest.mark.parametrize("rows", [None, [[4, 15], [2, 1, 16]]])
@pytest.mark.parametrize("per_channel", [False, True])
def test_mamba_split_conv1d_scan(oracles, hold_to, packed, rows, per_channel):
    torch.manual_seed(2)
    heads, width, groups, state = 4, 3, 2, 5
    inner, doubled = heads * width, 2 * groups * state
    tensors = {
        "zxbcdt": rand(2, 19, 2 * inner + doubled + heads),
        "conv1d_weight": rand(inner + doubled, 4),
        "conv1d_bias": rand(inner + doubled),
        "dt_bias": rand(heads),
        "A": -torch.rand(heads).to(DTYPE) - 0.1,
        "D": rand(heads, width) if per_channel else rand(heads),
    }
    options = {"chunk_size": 8, "ngroups": groups, "headdim": width}

    def reference(zxbcdt, **t):
        outputs = [[], []]
        for row, start, stop in documents(rows, 2, 19):
            piece = zxbcdt[row : row + 1, start:stop]
            outputs[row].append(oracles.mamba_split_conv1d_scan_ref(piece, **t, **options))
        return torch.cat([torch.cat(parts, dim=1) for parts in outputs])

    def ours(**t):
        seq_idx = None if rows is None else packed(rows)
        return mamba_split_conv1d_scan(**t, **options, seq_idx=seq_idx)

    hold_to(reference, ours, tensors, 1e-5)


@pytest.mark.parametrize("group_size", [None, 3])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_gated_rms_norm(oracles, hold_to, group_size, norm_before_gate, gated):
    torch.manual_seed(3)
    tensors = {"x": rand(5, 2, 12), "weight": rand(12)}
    if gated:
        tensors["z"] = rand(5, 2, 12)
    options = {"eps": 1e-3, "group_size": group_size, "norm_before_gate": norm_before_gate}

    def reference(x, weight, z=None):
        return oracles.rms_norm_ref(x, weight, None, z, upcast=False, **options)

    # The reference takes the weight through float32, which rounds its gradient alone.
    hold_to(reference, lambda **t: gated_rms_norm(**t, **options), tensors, 1e-6)


# -- Mamba-3 ---------------------------------------------------------------------------------------


def mamba3_steps(rotate, t, row, tokens, is_first, pairs):
    """The published step equations on one document; mamba-ssm's reference turns keys and queries.

    State arrays and their order are those of ``Mamba3.step``: angle, S, k and x of the last token.
    """
    heads, rank = t["x"].shape[2], t["B"].shape[2]
    repeat = heads // t["B"].shape[3]
    ssm, k_last, x_last, angle = (
        t[f"state_{name}"][row] * float(is_first) for name in ("ssm", "k", "v", "angle")
    )
    k_last = k_last.transpose(1, 2)  # mamba-ssm's [b, r, h, n]
    up = t.get("mimo_x", torch.ones(heads, rank, t["x"].shape[-1], dtype=DTYPE))
    outputs = []
    for i in range(tokens.start, tokens.stop):
        x, dt, A = t["x"][row, i], t["dt"][row, i], t["A"][row, i]
        q, k, angle = rotate(
            t["C"][row, i].repeat_interleave(repeat, dim=2),
            t["B"][row, i].repeat_interleave(repeat, dim=2),
            angle,
            t["theta"][row, i, None].expand(-1, heads, -1),
            dt,
            t["C_bias"].transpose(0, 1),
            t["B_bias"].transpose(0, 1),
            rotate_pairwise=pairs == "interleaved",
        )
        share, alpha = torch.sigmoid(t["trap"][row, i]), torch.exp(A * dt)
        now = torch.einsum("bhp,hrp,brhn->bhpn", x, up, k) * (share * dt)[..., None, None]
        last = torch.einsum("bhp,hrp,brhn->bhpn", x_last, up, k_last)
        last = last * ((1 - share) * dt * alpha)[..., None, None]
        ssm = ssm * alpha[..., None, None] + last + now
        read = torch.einsum("bhpn,brhn->bhrp", ssm, q)
        outputs.append(read + torch.einsum("h,bhp,hrp->bhrp", t["D"], x, up))
        k_last, x_last = k, x
    final = (ssm, k_last.transpose(1, 2), x_last, angle)
    return torch.stack(outputs, dim=1), final


@pytest.mark.parametrize("rows", ROWS)
# With "halves" mamba-ssm's reference turns pairs (i, i + s) of the first 2s channels, and the
# kernels (i, i + n/2): the same where every pair turns.
@pytest.mark.parametrize(("pairs", "angles"), [("interleaved", 2), ("halves", 4)])
@pytest.mark.parametrize("rank", [1, 3])
def test_mamba3(oracles, hold_to, packed, rows, pairs, angles, rank):
    torch.manual_seed(4)
    batch, length, heads, width, groups, state = 2, 21, 4, 3, 2, 8
    tensors = {
        "x": rand(batch, length, heads, width),
        "B": rand(batch, length, rank, groups, state),
        "C": rand(batch, length, rank, groups, state),
        "B_bias": rand(heads, rank, state),
        "C_bias": rand(heads, rank, state),
        "dt": F.softplus(rand(batch, length, heads)),
        "A": -F.softplus(rand(batch, length, heads)),
        "trap": rand(batch, length, heads),
        "theta": rand(batch, length, angles),
        "D": rand(heads),
        "state_ssm": rand(batch, heads, width, state),
        "state_k": rand(batch, heads, rank, state),
        "state_v": rand(batch, heads, width),
        "state_angle": rand(batch, heads, angles),
    }
    if rank > 1:
        tensors["mimo_x"] = rand(heads, rank, width)

    def on_the_circle(y, ssm, k, v, angle):
        """An angle means the same 2π further on."""
        return y, ssm, k, v, angle.sin(), angle.cos()

    def reference(**t):
        rotate = oracles.apply_rotary_qk_inference_reference

        def one(*document):
            return mamba3_steps(rotate, t, *document, pairs)

        return on_the_circle(*by_document(rows, batch, length, one))

    def ours(trap, theta, **t):
        parts = Mamba3State(*(t.pop(f"state_{name}") for name in Mamba3State._fields))
        seq_idx = None if rows is None else packed(rows)
        y, final = mamba3_chunked(
            **t,
            lam=torch.sigmoid(trap),
            angle_rate=math.pi * torch.tanh(theta),
            initial_state=parts,
            seq_idx=seq_idx,
            pairs=pairs,
            chunk_size=8,
        )
        return on_the_circle(y, *final)

    hold_to(reference, ours, tensors, 1e-10)


# -- and nothing else changes ----------------------------------------------------------------------


def test_the_peers_stay_out_of_reach():
    """Megatron would take mamba_ssm's kernels if it could import them: not from this folder."""
    folder = str(Path(sys.prefix) / "oracles")
    assert folder not in sys.path
    files = [str(getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    assert not [file for file in files if file.startswith(folder)]
