"""Float64 throughout: a computation that casts to float32 somewhere computes in float64 there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """While it is on, ``.float()`` is ``.double()``, and ``torch.float32`` as an argument is
    ``torch.float64``.

    Megatron and transformers compute some things in float32 whatever the model's dtype is: router
    scores, gates, norms, decays. Two forms of one function then differ by float32 rounding; in
    this mode they agree to float64's.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Megatron builds RoPE's table of frequencies in float32 before this mode is on. So a range
        # with a step, which begins that table in transformers, stays float32; positions do not.
        if func.__name__ == "arange" and len(args) == 3:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wider = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wider, args), **wider)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
