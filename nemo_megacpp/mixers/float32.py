"""Parameters that stay float32 in a model of bfloat16 or float16.

Decay rates and step sizes need more than bfloat16: a forget gate is near one, where bfloat16 has a
step of 2⁻⁸. Megatron's ``Float16Module`` converts every parameter of a model through
``Module._apply``, which each module may override.

A model with a plain ``TransformerConfig``, which Megatron's own scripts build, is converted whole:
the optimizers of Megatron-Core 0.16.1 cannot save a model that has both dtypes
(:mod:`nemo_megacpp.checkpoint.optimizer_state` can). What is computed from the parameters is
float32 there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.config import HybridConfig

_MARK = "keep_in_fp32"  # as later releases of Megatron-Core name it
_FLOAT32_BYTES = 4


def keep_in_float32(parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Make ``parameter``, of a :class:`KeepsFloat32` module, at least float32, and keep it so.

    Args:
        parameter: of the module.
        config: of the model; with a plain ``TransformerConfig`` later conversions apply.
    """
    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    setattr(parameter, _MARK, isinstance(config, HybridConfig))


class KeepsFloat32(torch.nn.Module):
    """A module whose marked parameters are converted to no dtype narrower than float32.

    Devices, wider dtypes and everything else of ``to``, ``bfloat16``, ``half`` and the like are as
    for any module. It must come before Megatron's classes among the bases.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        marked = [p for p in self.parameters(recurse=False) if getattr(p, _MARK, False)]
        kept = {id(t) for p in marked for t in (p, p.grad)}

        def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            if id(tensor) in kept and converted.dtype.itemsize < _FLOAT32_BYTES:
                return tensor.to(converted.device)
            return converted

        return super()._apply(at_least_float32, recurse)
