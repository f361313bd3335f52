"""The shapes of a kernel's arguments: axes by letter, and what is said of one that does not fit."""

from __future__ import annotations

import pytest
import torch

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.packing import check_shapes


def test_axes_are_bound_in_order() -> None:
    x, bias = torch.zeros(2, 5, 3), torch.zeros(3)
    assert check_shapes({"x": (x, "b l h"), "bias": (bias, "h"), "z": (None, "b l h p")}) == {
        **{"b": 2, "l": 5, "h": 3}
    }
    assert check_shapes({"bias": (bias, "h")}, h=3, n=7) == {"h": 3, "n": 7}


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((2, 6, 3), "b l h", r"y must have shape \[b, l, h\] \(b=2, l=5, h=3\), got \[2, 6, 3\]"),
        ((2, 5), "b l h", r"y must have shape \[b, l, h\] .* got \[2, 5\]"),
        ((4, 5), "v v", r"y must have shape \[v, v\] \(v=4, v=4\), got \[4, 5\]"),
    ],
)
def test_a_wrong_shape_is_named(shape: tuple[int, ...], axes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shapes({"x": (torch.zeros(2, 5, 3), "b l h"), "y": (torch.zeros(shape), axes)})


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="at least one token, got l=0"):
        check_shapes({"x": (torch.zeros(2, 0, 3), "b l h")})
