"""How a form that trains is held to its reference: every output and every gradient.

The references are our own loops, and, as ``oracles``, those of mamba-ssm and causal-conv1d.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mixers.kernels.triton_interpreter import interpreter_process

Tensors = dict[str, Tensor]


def run_with_gradients(
    function: Callable[..., Any], tensors: Tensors, options: dict[str, Any]
) -> Tensors:
    """Call ``function``; return its outputs and the gradient of every tensor, by name.

    The loss weighs every output with fixed random numbers, so no gradient can hide.
    """
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (output.double() * weight).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same(actual: Tensors, expected: Tensors, rtol: float) -> None:
    """Hold each tensor to ``rtol`` of the largest magnitude in its reference."""
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        value = actual[name]
        assert value.shape == reference.shape, name
        scale = reference.double().abs().max().clamp_min(1e-12)
        error = ((value.double() - reference.double()).abs().max() / scale).item()
        assert error <= rtol, f"{name}: relative error {error:.2e} > {rtol:.0e}"


@pytest.fixture
def hold_to() -> Callable[..., None]:
    """``hold_to(reference, form, tensors, rtol, options, form_options)``: outputs and gradients.

    With ``reference_dtype`` the reference computes in that dtype, so that its own rounding is none.
    """

    def hold(
        reference: Callable[..., Any],
        form: Callable[..., Any],
        tensors: Tensors,
        rtol: float,
        options: dict[str, Any] | None = None,
        form_options: dict[str, Any] | None = None,
        reference_dtype: torch.dtype | None = None,
    ) -> None:
        options = options or {}
        exact = {name: t.to(reference_dtype or t.dtype) for name, t in tensors.items()}
        expected = run_with_gradients(reference, exact, options)
        actual = run_with_gradients(form, tensors, options | (form_options or {}))
        assert_same(actual, expected, rtol)

    return hold


@pytest.fixture
def packed() -> Callable[[list[list[int]]], Tensor]:
    """``packed([[3, 5], [8]])``: seq_idx of rows whose documents have these lengths."""

    def build(rows: list[list[int]]) -> Tensor:
        # Values fall and repeat: only a change from one token to the next may matter.
        return torch.stack(
            [
                torch.cat([torch.full((n,), 7 * (i % 2) + row) for i, n in enumerate(lengths)])
                for row, lengths in enumerate(rows)
            ]
        ).int()

    return build


_PEERS = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")


def _peer_modules() -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n.split(".")[0] in _PEERS}


def _bare(name: str, folder: Path | None = None, **content: Any) -> None:
    """Put a module in place of one whose own code would ask for CUDA extensions."""
    module = ModuleType(name)
    if folder is not None:
        module.__path__ = [str(folder)]
    vars(module).update(content)
    sys.modules[name] = module


@cache
def _load_oracles(folder: Path) -> tuple[SimpleNamespace, dict[str, ModuleType]]:
    """Import the references; return them by name, and the modules that they live in."""
    before = _peer_modules()
    for name in before:
        del sys.modules[name]
    try:
        _bare("mamba_ssm", folder / "mamba_ssm")
        _bare("mamba_ssm.modules", folder / "mamba_ssm" / "modules")
        _bare("causal_conv1d", folder / "causal_conv1d")
        compiled = [f"causal_conv1d_{kind}_function" for kind in ("fwd", "bwd", "update")]
        _bare("causal_conv1d.cpp_functions", **dict.fromkeys(compiled))
        _bare("selective_scan_cuda")
        conv: Any = importlib.import_module("causal_conv1d.causal_conv1d_interface")
        varlen: Any = importlib.import_module("causal_conv1d.causal_conv1d_varlen")
        selective: Any = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        combined: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        norm: Any = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
        minimal: Any = importlib.import_module("mamba_ssm.modules.ssd_minimal")
        rotary: Any = importlib.import_module("mamba_ssm.ops.triton.mamba3.mamba3_mimo_rotary_step")
        # mamba_split_conv1d_scan_ref calls the CUDA forms of its parts; these are the torch ones.
        combined.causal_conv1d_fn = conv.causal_conv1d_ref
        selective.selective_scan_fn = selective.selective_scan_ref
        references = SimpleNamespace(
            causal_conv1d_ref=conv.causal_conv1d_ref,
            causal_conv1d_varlen_states_ref=varlen.causal_conv1d_varlen_states_ref,
            selective_scan_ref=selective.selective_scan_ref,
            ssd_chunk_scan_combined_ref=combined.ssd_chunk_scan_combined_ref,
            mamba_split_conv1d_scan_ref=combined.mamba_split_conv1d_scan_ref,
            ssd_minimal_discrete=minimal.ssd_minimal_discrete,
            rms_norm_ref=norm.rms_norm_ref,
            apply_rotary_qk_inference_reference=rotary.apply_rotary_qk_inference_reference,
        )
        return references, _peer_modules()
    finally:
        for name in _peer_modules():
            del sys.modules[name]
        sys.modules.update(before)


def oracles_folder() -> Path:
    """Where `make oracles` puts the peers' packages; the test fails if it is not there."""
    folder = Path(sys.prefix) / "oracles"
    if not (folder / "mamba_ssm").is_dir():
        pytest.fail(f"No reference packages in {folder}: run `make oracles`.", pytrace=False)
    return folder


@pytest.fixture
def oracles(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The pure-torch references of mamba-ssm and causal-conv1d, by name.

    Python does not search their folder, and after the test nothing of theirs stays importable:
    where Megatron finds mamba_ssm, it takes its kernels.
    """
    references, modules = _load_oracles(oracles_folder())
    for name in _peer_modules():
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():  # one of the references imports as it runs
        monkeypatch.setitem(sys.modules, name, module)
    return references


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that runs Triton kernels on the CPU."""
    with interpreter_process() as pool:
        yield pool
