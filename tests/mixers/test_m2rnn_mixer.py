"""The R mixer by hand on one rank, on packs, and under context parallelism in both forms."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.nn import functional as F

from benchmarks.m2rnn import m2rnn_naive
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers import m2rnn_mixer as module
from nemo_megacpp.mixers.head_parallel import log_once
from nemo_megacpp.mixers.m2rnn_mixer import M2RNNMixer
from nemo_megacpp.mixers.sequence_layout import token_order
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config
from tests.mixers.kernels.naive import causal_conv1d_naive

# Without a bound on the state's gradient, gradients are linear: those of ranks can be added up.
MODEL = tiny_model("R", m2rnn_state_gradient_clip=None)
TOLERANCE = 1e-12
"""Of the largest value, in float64: sums of a few hundred terms in another order."""


def _mixer(cp: int, **changes: Any) -> M2RNNMixer:
    """Build the mixer; parameters are random, and the same in every layout of cp."""
    layout = ParallelLayout.parse(f"cp={cp}")
    start_model_parallel(layout)
    config = make_config(StepSpec({**MODEL, **changes}, dtype="float64"), layout)
    (chunk,) = build_chunks(config, layout)
    mixer = chunk.decoder.layers[0].mixer  # type: ignore[union-attr, index]
    assert isinstance(mixer, M2RNNMixer)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise)
    return mixer


def _random(seed: int, length: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (length, batch, MODEL["hidden_size"])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _pack(ends: list[int] | None) -> PackedSeqParams | None:
    if ends is None:
        return None
    boundaries = torch.tensor(ends, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)


def _by_hand(
    mixer: M2RNNMixer,
    hidden: torch.Tensor,
    packed: PackedSeqParams | None,
    depth_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The equations of the module's docstring on ``[s, b, h]``, from the naive kernels: the output
    and the depth state that is handed on."""
    heads, K, V = mixer.num_heads, mixer.k_dim, mixer.v_dim
    x = hidden.transpose(0, 1)
    batch, length, _ = x.shape
    split = (x @ mixer.in_proj.weight.T).view(batch, length, heads, 2 * V + 1)
    v, f, g = split[..., :V], split[..., V], split[..., V + 1 :]
    documents = None
    if packed is not None:
        order = token_order(length, 1, packed)
        assert order.documents is not None
        documents = order.documents.expand(batch, -1)
    qkv = causal_conv1d_naive(
        torch.cat([x @ mixer.in_proj.shared_weight.T, v.flatten(2)], dim=-1),
        torch.cat([mixer.shared_conv_weight, mixer.conv_weight]),
        activation="silu",
        seq_idx=documents,
    )
    q, k, v = qkv[..., :K], qkv[..., K : 2 * K], qkv[..., 2 * K :].unflatten(-1, (heads, V))
    if depth_state is not None:
        gate = mixer.depth_gate.view(heads, V)
        v = torch.stack(
            [v[:, :, n] + gate[n] * depth_state.transpose(0, 1) for n in range(heads)], 2
        )
    forget = torch.exp(-torch.exp(mixer.A_log) * F.softplus(f + mixer.dt_bias))
    y, _ = m2rnn_naive(q, k, v, forget, mixer.state_weight, seq_idx=documents)
    y = (y + mixer.D.view(heads, V) * v) * F.silu(g)
    y, eps = y.flatten(2), mixer.config.layernorm_epsilon
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps) * mixer.norm_weight
    summary = sum(y[..., n * V : (n + 1) * V] for n in range(heads)) / heads
    return (y @ mixer.out_proj.weight.T).transpose(0, 1), summary.transpose(0, 1)


def _with_gradients(
    mixer: M2RNNMixer, output: torch.Tensor, hidden: torch.Tensor, form: torch.Tensor
) -> dict[str, np.ndarray]:
    # Not autograd.grad: it would skip the node that sends the state's gradient to the last segment.
    (output * form).sum().backward()
    gradients = {"hidden": hidden, **dict(mixer.named_parameters())}
    values = {name: t.grad for name, t in gradients.items()}
    hidden.grad = None
    mixer.zero_grad()
    return {name: t.numpy() for name, t in (("output", output.detach()), *values.items())}  # type: ignore[union-attr]


def _one_rank(ends: list[int] | None, batch: int, taps: int) -> tuple[dict, dict]:
    mixer, packed = _mixer(1, m2rnn_conv_kernel=taps), _pack(ends)
    hidden, form = _random(5, 16, batch).requires_grad_(), _random(6, 16, batch)
    return (
        _with_gradients(mixer, mixer(hidden, packed_seq_params=packed)[0], hidden, form),
        _with_gradients(mixer, _by_hand(mixer, hidden, packed)[0], hidden, form),
    )


def _documents_alone(ends: list[int]) -> tuple[np.ndarray, np.ndarray]:
    mixer, hidden = _mixer(1), _random(5, ends[-1], 1)
    with torch.no_grad():
        pack = mixer(hidden, packed_seq_params=_pack(ends))[0]
        alone = [mixer(hidden[a:b])[0] for a, b in pairwise(ends)]
    return pack.numpy(), torch.cat(alone).numpy()


def _shared_sequence(
    cp: int, form_of_cp: str, length: int, ends: list[int] | None, batch: int, taps: int
) -> tuple[bool, dict[str, np.ndarray]]:
    mixer = _mixer(cp, m2rnn_context_parallel=form_of_cp, m2rnn_conv_kernel=taps)
    mine = token_order(length, cp, _pack(ends)).of_rank(mixer.cp_group.rank())
    hidden = _random(5, length, batch)[mine].requires_grad_()
    output = mixer(hidden, packed_seq_params=_pack(ends))[0]
    form = _random(6, length, batch)[mine]
    return mixer.serial, _with_gradients(mixer, output, hidden, form)


def _refusal(cp: int, heads: int) -> str:
    try:
        _mixer(cp, m2rnn_num_heads=heads, m2rnn_context_parallel="all_to_all")
    except UserError as error:
        return str(error)
    return ""


def _kernel(kernel: str, triton_runs: bool) -> tuple[str, int]:
    """Run the mixer; return what it logs or refuses, and how often it called the Triton form."""
    calls: list[dict[str, Any]] = []

    def recorded(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(options)
        return m2rnn_naive(*tensors, **options)

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nemo_megacpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "m2rnn_triton", recorded)
        if triton_runs:
            patch.setattr(module, "m2rnn_triton_reason", lambda **_: None)
        patch.setattr(logger, "level", logging.INFO)
        patch.setattr(logger, "handlers", [handler])
        log_once.cache_clear()
        try:
            _mixer(1, m2rnn_kernel=kernel)(_random(5, 8, 1))
        except UserError as error:
            lines.append(str(error))
    return "".join(lines), len(calls)


def _assert_equal(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        scale = abs(value).max()
        assert scale > 1e-6, name
        assert abs(found[name] - value).max() <= TOLERANCE * scale, name


@pytest.mark.parametrize(
    ("ends", "batch", "taps"), [(None, 2, 4), ([0, 5, 12], 1, 4), (None, 2, 1), ([0, 5, 12], 1, 1)]
)
def test_by_hand(ranks: WorkerPool, ends: list[int] | None, batch: int, taps: int) -> None:
    """Output, input gradient and the gradient of every parameter."""
    found, expected = ranks.run(1, _one_rank, ends, batch, taps)[0]
    assert len(expected) == 2 + 10
    _assert_equal(expected, found)


def _in_depth(ends: list[int] | None, batch: int) -> tuple[dict, dict]:
    """Two passes in a row, as two R blocks: the second takes what the first hands on."""
    mixer, packed = _mixer(1, m2rnn_depth_state=True), _pack(ends)
    hidden, other = _random(5, 12, batch).requires_grad_(), _random(8, 12, batch)
    form = _random(6, 12, batch)
    _, state = mixer(hidden, packed_seq_params=packed, hands_on=True)
    output, state = mixer(other, state, packed_seq_params=packed, hands_on=True)
    _, expected = _by_hand(mixer, hidden, packed)
    by_hand, handed = _by_hand(mixer, other, packed, expected)
    V, (nothing, none) = mixer.v_dim, mixer(hidden, packed_seq_params=packed)
    assert none is None and nothing.shape == hidden.shape
    return tuple(
        _with_gradients(mixer, torch.cat([y, r], -1), hidden, torch.cat([form, form[..., :V]], -1))
        for y, r in ((output, state), (by_hand, handed))
    )


@pytest.mark.parametrize(("ends", "batch"), [(None, 2), ([0, 5, 12], 1)])
def test_depth_state_by_hand(ranks: WorkerPool, ends: list[int] | None, batch: int) -> None:
    """Through the state alone: the second pass does not read the first one's output."""
    found, expected = ranks.run(1, _in_depth, ends, batch)[0]
    assert len(expected) == 2 + 11
    _assert_equal(expected, found)


def _later_token(ends: list[int] | None, changed: int) -> list[int]:
    """Return the tokens whose output or state of a second pass changes with one of the first."""
    mixer, packed = _mixer(1, m2rnn_depth_state=True), _pack(ends)
    hidden, other = _random(5, 12, 1), _random(8, 12, 1)
    results = []
    with torch.no_grad():
        for step in (0.0, 1.0):
            hidden[changed] += step
            _, state = mixer(hidden, packed_seq_params=packed, hands_on=True)
            results.append(
                torch.cat(mixer(other, state, packed_seq_params=packed, hands_on=True), -1)
            )
    return torch.nonzero((results[0] != results[1]).any(-1).any(-1)).flatten().tolist()


@pytest.mark.parametrize(("ends", "until"), [(None, 12), ([0, 5, 9, 12], 9)])
def test_depth_state_is_causal_and_stays_in_its_document(
    ranks: WorkerPool, ends: list[int] | None, until: int
) -> None:
    assert ranks.run(1, _later_token, ends, 6)[0] == list(range(6, until))


def test_norm_spans_all_heads(ranks: WorkerPool) -> None:
    """A norm per head would pass a test by shape: here one head's gate scales all the others."""
    assert ranks.run(1, _one_head_louder)[0]


def _one_head_louder() -> bool:
    mixer, hidden = _mixer(1), _random(5, 4, 1)
    V = mixer.v_dim
    y = _random(7, 4, 1)[..., : mixer.num_heads * V]
    louder = torch.cat([10 * y[..., :V], y[..., V:]], dim=-1)
    with torch.no_grad():
        quiet, loud = mixer._norm(y), mixer._norm(louder)
    assert hidden.shape == y.shape
    return bool((loud[..., V:].abs() < quiet[..., V:].abs()).all())


@pytest.mark.parametrize("ends", [[0, 5, 12, 16], [0, 1, 2, 16], [0, 15, 16]])
def test_pack_equals_documents_alone(ranks: WorkerPool, ends: list[int]) -> None:
    pack, alone = ranks.run(1, _documents_alone, ends)[0]
    assert abs(pack - alone).max() <= TOLERANCE * abs(alone).max()


# Documents in multiples of 2·cp. With CP=2, segments of 20 tokens start at 10 and their convolution
# looks back on 7, 8 and 9; of 24, at 12. With CP=4, those of 24 start at 6, 12 and 18.
PACKS: list[tuple[int, str, list[int] | None]] = [
    (2, "one document", None),
    (2, "a boundary between the segments", [0, 8, 12, 24]),
    (2, "a boundary in the window, before", [0, 8, 20]),
    (2, "a boundary in the window, after", [0, 12, 20]),
    (2, "the shortest documents", [0, 4, 8, 12, 16, 20]),
    (2, "an empty document", [0, 12, 12, 24]),
    (4, "one document", None),
    (4, "a boundary in the windows, before and after", [0, 8, 16, 24]),
    (4, "a document over three segments", [0, 8, 24]),
]


@pytest.mark.parametrize("form_of_cp", ["all_to_all", "serial"])
@pytest.mark.parametrize(("cp", "name", "ends"), PACKS)
def test_context_parallel(
    ranks: WorkerPool, cp: int, form_of_cp: str, name: str, ends: list[int] | None
) -> None:
    """Output and input gradient are slices of one rank's; parameters' gradients add up."""
    _hold_under_cp(ranks, cp, form_of_cp, ends[-1] if ends else 16, ends, 1)


@pytest.mark.parametrize(
    ("form_of_cp", "length", "ends", "batch"),
    [
        ("all_to_all", 16, None, 2),
        ("serial", 16, None, 2),
        # Segments of two tokens are shorter than the window of three.
        ("serial", 8, None, 1),
        ("serial", 16, [0, 8, 16], 1),
    ],
)
def test_batches_and_short_segments(
    ranks: WorkerPool, form_of_cp: str, length: int, ends: list[int] | None, batch: int
) -> None:
    _hold_under_cp(ranks, 4, form_of_cp, length, ends, batch)


@pytest.mark.parametrize("form_of_cp", ["all_to_all", "serial"])
@pytest.mark.parametrize("ends", [None, [0, 8, 20]])
def test_one_tap_under_cp(ranks: WorkerPool, form_of_cp: str, ends: list[int] | None) -> None:
    """A convolution of one tap looks back on nothing, and hands nothing on."""
    _hold_under_cp(ranks, 2, form_of_cp, ends[-1] if ends else 16, ends, 1, taps=1)


def _hold_under_cp(
    ranks: WorkerPool,
    cp: int,
    form_of_cp: str,
    length: int,
    ends: list[int] | None,
    batch: int,
    taps: int = 4,
) -> None:
    _, expected = ranks.run(1, _shared_sequence, 1, form_of_cp, length, ends, batch, taps)[0]
    results = ranks.run(cp, _shared_sequence, cp, form_of_cp, length, ends, batch, taps)
    assert {serial for serial, _ in results} == {form_of_cp == "serial"}
    found = {name: sum(part[name] for _, part in results) for name in expected}
    order = token_order(length, cp, _pack(ends))
    for name in ("output", "hidden"):
        found[name] = np.full_like(expected[name], np.nan)
        for rank, (_, part) in enumerate(results):
            found[name][order.of_rank(rank).numpy()] = part[name]
    _assert_equal(expected, found)


def _first_convolutions() -> tuple[float, float]:
    start_model_parallel(ParallelLayout())
    model = tiny_model("R", m2rnn_num_heads=64, m2rnn_key_head_dim=64, init_method_std=0.02)
    config = make_config(StepSpec(model), ParallelLayout())
    mixer: Any = build_chunks(config, ParallelLayout())[0].decoder.layers[0].mixer  # type: ignore[union-attr, index]
    return float(mixer.conv_weight.std()), float(mixer.shared_conv_weight.std())


def test_the_convolution_starts_as_its_authors_start_it(ranks: WorkerPool) -> None:
    """As lm-engine does: normal, with the standard deviation of the projections."""
    for deviation in ranks.run(1, _first_convolutions)[0]:
        assert deviation == pytest.approx(0.02, rel=0.15)


def test_heads_that_do_not_divide_are_refused(ranks: WorkerPool) -> None:
    messages = set(ranks.run(4, _refusal, 4, 6))
    assert len(messages) == 1
    (message,) = messages
    for part in ("'all_to_all'", "6 heads / TP=1 = 6", "CP=4", "'serial' or 'auto'"):
        assert part in message, message
    assert ranks.run(2, _refusal, 2, 6) == ["", ""]


@pytest.mark.parametrize(
    ("kernel", "triton_runs", "said", "calls"),
    [
        ("auto", False, "Using the PyTorch M²RNN kernel (Triton needs a CUDA", 0),
        ("auto", True, "Using the Triton M²RNN kernel.", 1),
        ("triton", True, "Using the Triton M²RNN kernel.", 1),
        ("torch", True, "", 0),
        (
            "triton",
            False,
            "m2rnn_kernel='triton' cannot be used: the kernel computes in float32; the",
            0,
        ),
    ],
)
def test_which_kernel_runs(
    ranks: WorkerPool, kernel: str, triton_runs: bool, said: str, calls: int
) -> None:
    lines, found = ranks.run(1, _kernel, kernel, triton_runs)[0]
    assert lines.startswith(said) if said else not lines
    assert found == calls
