"""How a form that trains is held to its reference: every output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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
