"""The Triton form of M²RNN: its numbers in Triton's interpreter, and that it compiles for a GPU.

float32 is held to 1e-5 of the largest value of the reference loop in float64, for every output
and gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import m2rnn_sass
from benchmarks.m2rnn import m2rnn_naive
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers import kernels as package
from nemo_megacpp.mixers.kernels import m2rnn_triton as triton_form
from nemo_megacpp.mixers.kernels.m2rnn_triton import m2rnn_triton, m2rnn_triton_reason
from tests.mixers.kernels.conftest import assert_same, run_with_gradients
from tests.mixers.kernels.inputs import m2rnn_inputs
from tests.selection import slow_if

Tensors = dict[str, Tensor]


def _run(tensors: Tensors, options: dict[str, Any]) -> Tensors:
    return run_with_gradients(m2rnn_triton, tensors, options)


@pytest.fixture
def interpreted(interpreter: ProcessPoolExecutor) -> Callable[[Tensors, dict[str, Any]], Tensors]:
    """Run the Triton form in the interpreter: outputs and gradients by name."""
    return lambda tensors, options: interpreter.submit(_run, tensors, options).result()


def small(dtype: torch.dtype = torch.float32, **sizes: Any) -> Tensors:
    tensors = m2rnn_inputs(**({"batch": 1, "length": 9, "heads": 2} | sizes), dtype=torch.float32)
    # A contracting W: with a larger one the recurrence is chaotic, and any rounding grows.
    tensors["W"] = 0.3 * tensors["W"]
    return {name: t.to(dtype) for name, t in tensors.items()}


CLIPPED = {"state_gradient_clip": 0.3}
CASES: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "one-token": (small(length=1), {}),
    "chunks-of-odd-lengths": (small(length=11), {"checkpoint_every": 4}),
    "own-q-and-k": (small(per_head=True), {"checkpoint_every": 3}),
    "clip-before": (small(), CLIPPED | {"clip_order": "before_output"}),
    "clip-after": (small(), CLIPPED | {"clip_order": "after_output", "checkpoint_every": 5}),
    # 20 rows of the state: two programs a head, the second of them a quarter full.
    "two-parts": (small(key=20, length=5), CLIPPED | {"checkpoint_every": 2}),
    "wide-values": (small(value=17, length=4), {}),
    "small-inputs": (
        {n: (t if n in ("forget", "W") else 1e-2 * t) for n, t in small(key=8).items()},
        {},
    ),
    "whole-tiles": (small(key=16, value=16, length=5), {"checkpoint_every": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(interpreted, case):
    tensors, options = CASES[case]
    exact = {name: t.double() for name, t in tensors.items()}
    reference_options = {k: v for k, v in options.items() if k != "checkpoint_every"}
    expected = run_with_gradients(m2rnn_naive, exact, reference_options)
    assert_same(interpreted(tensors, options), expected, 1e-5)


@pytest.mark.parametrize("clip_order", ["before_output", "after_output"])
def test_packed_documents(interpreted, packed, clip_order):
    tensors = small(batch=2, length=7)
    # A document that ends with a chunk, one that spans two, and documents of one token.
    options = {"seq_idx": packed([[4, 3], [1, 1, 5]]), "clip_order": clip_order, **CLIPPED}
    exact = {name: t.double() for name, t in tensors.items()}
    expected = run_with_gradients(m2rnn_naive, exact, options)
    assert_same(interpreted(tensors, options | {"checkpoint_every": 4}), expected, 1e-5)


def test_without_an_initial_state(interpreted):
    tensors = {k: v for k, v in small(length=3).items() if k != "initial_state"}
    exact = {name: t.double() for name, t in tensors.items()}
    assert_same(interpreted(tensors, {}), run_with_gradients(m2rnn_naive, exact, {}), 1e-5)


def test_bfloat16_computes_in_float32(interpreted):
    tensors = small(torch.bfloat16)
    found = interpreted(tensors, CLIPPED)
    exact = {name: t.double() for name, t in tensors.items()}
    expected = run_with_gradients(m2rnn_naive, exact, CLIPPED)
    dtypes = {name: t.dtype for name, t in found.items()}
    assert dtypes.pop("output 1") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    # What is stored has 8 bits of mantissa: y before the loss too, but its weights are fixed.
    assert_same(found, expected, 2**-8)
    assert_same({"final": found["output 1"]}, {"final": expected["output 1"]}, 1e-5)


# -- on a GPU --------------------------------------------------------------------------------------

_VARIANTS: list[dict[str, Any]] = [
    # Triton takes a missing pointer and a size of one as constants.
    {"HAS_RESETS": False, "keep": None, "CLIP": 0},
    {"length": 1, "heads": 1},
    {"CLIP": 2, "dtype": "fp32"},
]


@pytest.mark.parametrize("kernel", m2rnn_sass.LOOPS)
@pytest.mark.parametrize(
    ("value_dim", "variant"),
    [
        pytest.param(value_dim, variant, marks=slow_if(value_dim != 16))
        for value_dim in (16, 17, 32, 33, 64)
        for variant in _VARIANTS
    ],
)
def test_compiles_for_a_gpu_without_spills(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernel: str,
    value_dim: int,
    variant: dict[str, Any],
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = m2rnn_sass.figures(kernel, value_dim, **variant)
    assert found.spilled == 0
    assert all(found.tensor_core)
    if value_dim == 16 and "length" not in variant:
        assert max(found.barriers) <= 4


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "needs a CUDA device"),
        ({"value_dim": 65}, "m2rnn_value_head_dim of at most 64; it is 65"),
        ({"dtype": torch.float64}, "computes in float32; the activations are float64"),
    ],
)
def test_reasons(changes: dict[str, Any], reason: str) -> None:
    runs: dict[str, Any] = {"value_dim": 16, "dtype": torch.bfloat16}
    assert m2rnn_triton_reason(**runs) is None
    assert reason in str(m2rnn_triton_reason(**{**runs, **changes}))


def test_an_old_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = m2rnn_triton_reason(value_dim=16, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    assert found == "needs compute capability 8.0; cuda:0 has 7.5"


def test_a_triton_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "m2rnn_triton_kernels"
    monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", None)
    monkeypatch.delattr(package, name, raising=False)
    triton_form._kernels.cache_clear()
    with pytest.raises(UserError, match="cannot be imported"):
        m2rnn_triton(**small())
    triton_form._kernels.cache_clear()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"W": torch.randn(2, 3, 4)}, "W must"),
        ({"state_gradient_clip": 0.0}, "state_gradient_clip"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"v": torch.randn(1, 9, 2, 3).double()}, "float64"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        m2rnn_triton(**(small() | change))
