"""Random inputs of the scans."""

from __future__ import annotations

import torch
from torch import Tensor


def m2rnn_inputs(
    batch: int = 2,
    length: int = 37,
    heads: int = 3,
    key: int = 4,
    value: int = 3,
    per_head: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the arguments of M²RNN's scan; with ``per_head``, each head has a query and a key."""
    torch.manual_seed(seed)
    head_axis = (heads,) if per_head else ()
    return {
        "q": torch.randn(batch, length, *head_axis, key, dtype=dtype),
        "k": torch.randn(batch, length, *head_axis, key, dtype=dtype),
        "v": torch.randn(batch, length, heads, value, dtype=dtype),
        "forget": torch.rand(batch, length, heads, dtype=dtype),
        "W": torch.eye(value, dtype=dtype) + 0.3 * torch.randn(heads, value, value, dtype=dtype),
        "initial_state": torch.randn(batch, heads, key, value, dtype=dtype),
    }
