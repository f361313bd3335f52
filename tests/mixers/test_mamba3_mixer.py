"""The Mamba-3 mixer: its rows, its forward pass by hand, its refusals, and the same in layouts."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import import_module
from torch import Tensor
from torch.nn import functional as F

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixer_settings import Mamba3Dimensions, Mamba3Settings
from nemo_megacpp.mixers.head_parallel import log_once
from nemo_megacpp.mixers.kernels.mamba3_state import negative_decay_rate
from nemo_megacpp.mixers.mamba3_mixer import Mamba3Mixer
from nemo_megacpp.mixers.mamba3_rows import rank_share, split_rows
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from tests.bare import build_chunks, make_config
from tests.mixers.kernels.naive import mamba3_naive, rows_in_mamba_ssm_order
from tests.path import run_step
from tests.selection import slow_if

# Between two M blocks an A block mixes tokens, so that a wrong token order cannot hide.
SISO = tiny_model("MAM", mode="mamba3")
MIMO = tiny_model(
    "MAM",
    mode="mamba3",
    mamba_num_groups=2,
    mamba3_mimo_rank=3,
    mamba3_rope_fraction=1.0,
    mamba3_A_activation="heavy_tail",
    mamba3_output_norm=True,
)
VARIANTS = {
    "siso": SISO,
    "siso-norm-halves": {**SISO, "mamba3_output_norm": True, "mamba3_pairs": "halves"},
    "mimo": {**MIMO, "mamba3_output_norm": False},
    "mimo-norm": MIMO,
}


# -- rows ------------------------------------------------------------------------------------------


def test_rows_in_mamba_ssm_order() -> None:
    dims = Mamba3Dimensions(
        num_heads=2, head_dim=1, state_dim=2, num_groups=2, mimo_rank=2, num_angles=1
    )
    # A group: B (r, n) 4 rows, C 4 rows, and its head's z, x, dd_dt, dd_A, trap; last of all, θ̂.
    assert split_rows(dims) == 26
    z, x, dd_dt, dd_A, trap = ([8 + i, 21 + i] for i in range(5))
    B = [0, 1, 13, 14, 2, 3, 15, 16]  # (r, g, n)
    C = [4, 5, 17, 18, 6, 7, 19, 20]
    expected = [*z, *x, *B, *C, *dd_dt, *dd_A, *trap, 26]
    assert rows_in_mamba_ssm_order(dims).tolist() == expected


# -- the forward pass, by hand ---------------------------------------------------------------------


def _by_hand(mixer: Any, hidden: Tensor, documents: Tensor | None) -> Tensor:
    """Mamba-3 as mamba_ssm writes it, on ``[s, b, h]``, from whole weights in its row order."""
    dims: Mamba3Dimensions = mixer.dims
    settings: Mamba3Settings = mixer.settings
    heads, head_dim, rank = dims.num_heads, dims.head_dim, dims.mimo_rank
    weight = torch.cat([mixer.in_proj.weight, mixer.in_proj.shared_weight])
    projected = hidden.transpose(0, 1) @ weight[rows_in_mamba_ssm_order(dims)].T
    inner, states = heads * head_dim, rank * dims.num_groups * dims.state_dim
    z, x, B, C, dd_dt, dd_A, trap, theta = projected.split(
        [inner, inner, states, states, heads, heads, heads, dims.num_angles], dim=-1
    )
    z, x = (t.unflatten(-1, (heads, head_dim)) for t in (z, x))
    B, C = (t.unflatten(-1, (rank, dims.num_groups, dims.state_dim)) for t in (B, C))

    def rms(t: Tensor) -> Tensor:
        return t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-5)

    o, _ = mamba3_naive(
        x,
        rms(B) * mixer.B_norm_weight,
        rms(C) * mixer.C_norm_weight,
        mixer.B_bias,
        mixer.C_bias,
        F.softplus(dd_dt + mixer.dt_bias),
        negative_decay_rate(dd_A, settings.A_floor, settings.A_activation),
        torch.sigmoid(trap),
        math.pi * torch.tanh(theta),
        mixer.D,
        mimo_x=mixer.mimo_x if rank > 1 else None,
        pairs=dims.pairs,
        seq_idx=documents,
    )
    if settings.output_norm:
        o = rms(o) * mixer.norm_weight.view(heads, 1, head_dim)
    ones = torch.ones(heads, 1, head_dim, dtype=x.dtype)
    mimo_z, mimo_o = (mixer.mimo_z, mixer.mimo_o) if rank > 1 else (ones, ones)
    gate = F.silu(torch.einsum("bshp,hrp->bshrp", z, mimo_z))
    y = torch.einsum("bshrp,bshrp,hrp->bshp", o, gate, mimo_o)
    return (y.flatten(2) @ mixer.out_proj.weight.T).transpose(0, 1)


def _one_rank(model: dict[str, Any]) -> dict[str, Any]:
    """On a rank: build, read the initial values, and run the mixer and its form by hand."""
    log_once.cache_clear()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nemo_megacpp")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    layout = ParallelLayout()
    start_model_parallel(layout, 3)
    chunk = build_chunks(make_config(StepSpec(model, dtype="float64"), layout), layout)[0]
    mixer, second = (chunk.decoder.layers[i].mixer for i in (0, 2))  # type: ignore[union-attr]
    initial = {name: p.detach().clone().numpy() for name, p in mixer.named_parameters()}
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    hidden = torch.randn(16, 2, model["hidden_size"], dtype=torch.float64, requires_grad=True)
    # Boundaries of two documents; the tokens after them are one more.
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    documents = torch.tensor([0] * 5 + [1] * 7 + [2] * 4).expand(2, -1)
    parameters = dict(mixer.named_parameters())
    form = torch.randn(16, 2, model["hidden_size"], dtype=torch.float64)

    def with_gradients(output: Tensor) -> dict[str, Any]:
        gradients = torch.autograd.grad((output * form).sum(), [hidden, *parameters.values()])
        names = ("output", "hidden", *parameters)
        values = (output.detach(), *gradients)
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    pairs = [
        (
            with_gradients(mixer(hidden, packed_seq_params=packs)[0]),
            with_gradients(_by_hand(mixer, hidden, ids)),
        )
        for packs, ids in ((None, None), (packed, documents))
    ]
    second(hidden)
    narrow = mixer.bfloat16()(hidden.bfloat16())[0]
    assert narrow.dtype == torch.bfloat16
    logger.removeHandler(handler)
    return {
        "initial": initial,
        "pairs": pairs,
        "log": lines,
        "narrow": narrow.detach().double().numpy(),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_by_hand(ranks: WorkerPool, variant: str) -> None:
    result = ranks.run(1, _one_rank, VARIANTS[variant])[0]
    for found, expected in result["pairs"]:
        for name, value in expected.items():
            assert abs(value).max() > 0, name
            assert abs(found[name] - value).max() <= 1e-12 * abs(value).max(), name
    whole, packs = (found["output"] for found, _ in result["pairs"])
    # Chunks end with the documents, so that sums have other lengths than in a whole row.
    assert abs(whole[:5] - packs[:5]).max() <= 1e-12 * abs(whole).max()
    assert abs(whole[5:] - packs[5:]).max() > 1e-3 * abs(whole).max()
    # bfloat16 keeps 8 bits, of weights and activations alike.
    assert abs(result["narrow"] - whole).max() <= 0.03 * abs(whole).max()


def test_initial_values_are_mamba_ssms(ranks: WorkerPool) -> None:
    initial = ranks.run(1, _one_rank, MIMO)[0]["initial"]
    step = F.softplus(torch.from_numpy(initial["dt_bias"]))
    assert step.min() >= 1e-3 * (1 - 1e-9) and step.max() <= 0.1 * (1 + 1e-9)
    assert len(set(step.tolist())) == 8
    ones = ("D", "B_bias", "C_bias", "B_norm_weight", "C_norm_weight", "norm_weight", "mimo_z")
    for name in ones:
        assert (initial[name] == 1).all(), name
    for name in ("mimo_x", "mimo_o"):
        assert (initial[name] == 1 / 3).all(), name
    vectors = {name for name, value in initial.items() if value.ndim == 1}
    assert vectors == {"dt_bias", "D", "B_norm_weight", "C_norm_weight", "norm_weight"}


def test_auto_says_once_why_it_scans_in_torch(ranks: WorkerPool) -> None:
    log = ranks.run(1, _one_rank, SISO)[0]["log"]
    assert [line for line in log if "Mamba-3" in line] == [
        "Using the PyTorch Mamba-3 kernel (Triton needs a CUDA device)."
    ]


def test_the_named_spec_has_this_mixer() -> None:
    native, ours = (
        import_module(("nemo_megacpp.specs", name)).submodules.layers["M"].submodules.mixer.module
        for name in ("hybrid_stack_spec", "hybrid_mamba3_stack_spec")
    )
    assert (native.__name__, ours) == ("Mamba2Mixer", Mamba3Mixer)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "mamba4"}, "mode='mamba4': the choices are nemo_native, mamba3"),
        ({"mamba3_mimo_rank": 0}, "mamba3_mimo_rank=0 must be at least 1"),
        ({"mamba3_rope_fraction": 1.5}, r"mamba3_rope_fraction=1.5 must lie in \[0.2, 1\]"),
        ({"mamba3_rope_fraction": 0.1}, r"mamba3_rope_fraction=0.1 must lie in \[0.2, 1\]"),
        ({"mamba3_rope_fraction": math.nan}, "mamba3_rope_fraction=nan must lie in"),
        ({"mamba3_A_floor": 0.0}, "mamba3_A_floor=0.0 must be above 0"),
        ({"mamba3_A_activation": "exp"}, "mamba3_A_activation='exp': .* softplus, heavy_tail"),
        ({"mamba3_pairs": "odd"}, "mamba3_pairs='odd': .* interleaved, halves"),
        ({"mamba3_kernel": "cuda"}, "mamba3_kernel='cuda': .* auto, torch, triton"),
        ({"mamba_state_dim": 9}, "mamba_state_dim=9 must be even"),
        ({"mamba_num_groups": 3}, "mamba_num_heads=8 is not a multiple of mamba_num_groups=3"),
        ({"mamba_head_dim": 0}, "mamba_head_dim=0 must be at least 1"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HybridConfig(**{**SISO, **changes})


def test_mamba3_settings_are_not_read_in_the_other_mode() -> None:
    HybridConfig(**{**SISO, "mode": "nemo_native", "mamba_state_dim": 9})


def test_dimensions_of_a_plain_configuration() -> None:
    plain = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, mamba_head_dim=16, mamba_state_dim=32
    )
    assert Mamba3Settings().dimensions(plain) == Mamba3Dimensions(8, 16, 32, 8, num_angles=8)
    for fields, pairs in ((MIMO, "halves"), (SISO, "interleaved")):
        config = HybridConfig(**fields)
        assert Mamba3Settings.of(config).dimensions(config).pairs == pairs


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "cp", "expected"),
    [
        (8, 4, 1, 1, (8, 4, 1)),
        (8, 4, 2, 2, (4, 2, 1)),
        (8, 2, 2, 2, (4, 1, 2)),
        (8, 2, 1, 4, (8, 2, 2)),
        (112, 8, 2, 8, (56, 4, 2)),
        (8, 4, 3, 1, "mamba_num_heads=8 is not divisible by TP=3"),
        (8, 2, 4, 1, "mamba_num_groups=2 is not divisible by TP=4"),
        (12, 4, 2, 4, "mamba_num_heads=12 / TP=2 = 6 heads .* not divisible by CP=4"),
        (24, 6, 2, 2, "mamba_num_groups=6 / TP=2 = 3 groups .* do not fit CP=2"),
    ],
)
def test_rank_share(heads: int, groups: int, tp: int, cp: int, expected: Any) -> None:
    dims = Mamba3Dimensions(heads, 4, 8, groups)
    if isinstance(expected, tuple):
        assert rank_share(dims, tp, cp) == expected
        return
    with pytest.raises(UserError, match=expected):
        rank_share(dims, tp, cp)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MIMO, "mamba3_kernel='triton' cannot be used: the kernel needs SISO; .* is 3"),
        (SISO, "mamba3_kernel='triton' cannot be used: .* power of two .* mamba_head_dim is 6"),
    ],
)
def test_triton_is_refused_while_building(
    ranks: WorkerPool, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(WorkerError, match=message):
        ranks.run(1, _one_rank, {**model, "mamba3_kernel": "triton"})


# -- layouts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references(
    ranks: WorkerPool,
) -> dict[str, tuple[StepSpec, StepResult]]:
    known = {}
    for name, model in (("siso", SISO), ("mimo", MIMO)):
        spec = StepSpec(model, objective="logits", dtype="float64")
        known[name] = spec, ranks.run(1, run_step, spec, ParallelLayout())[0]
    return known


# MIMO has two groups: tp=2,cp=2 gives two ranks the heads of one, cp=4 likewise for each of two.
@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param(name, layout, marks=slow_if(layout != "tp=2,cp=2"))
        for name in ("siso", "mimo")
        for layout in ("tp=2,cp=2", "tp=2,cp=2,sp=false", "cp=4")
    ],
)
def test_layouts_give_the_same_step(
    ranks: WorkerPool,
    references: dict[str, tuple[StepSpec, StepResult]],
    name: str,
    text: str,
) -> None:
    """Objective, every gradient, replicas, and every parameter after the step."""
    spec, expected = references[name]
    shared = [key for key in expected.gradients.values if "B_norm_weight" in key]
    assert shared and all(abs(expected.gradients.values[key]).max() > 1e-6 for key in shared)
    layout = ParallelLayout.parse(text)
    result = ranks.run(layout.world, run_step, spec, layout, expected.initial)[0]
    broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
    assert not broken, broken
