"""Column-parallel linears that Megatron's torch layers lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.mixer_settings import row_padding
from nemo_megacpp.mixers.head_parallel import log_once
from nemo_megacpp.mixers.norm import rms_norm, validate_torch_norm
from nemo_megacpp.mixers.replicated import mark_replicated, replicated


class NormColumnParallelLinear(ColumnParallelLinear):
    """``ColumnParallelLinear(RMSNorm(x))`` with parameters ``layer_norm_weight`` and ``weight``.

    These are the names of ``TELayerNormColumnParallelLinear``, so checkpoints of both backends are
    the same. Input ``[s, b, h]`` (``[s/tp, b, h]`` under SP), output ``[s, b, out/tp]``.

    ``layer_norm_weight``: replicated on tp with SP (gradient partial, summed over tp by Megatron
    through the ``sequence_parallel`` tag), invariant without SP. ``weight``: varying on tp (rows).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        **kwargs: Any,
    ):
        validate_torch_norm(config)
        super().__init__(input_size, output_size, config=config, init_method=init_method, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(input_size, dtype=config.params_dtype, device=self.weight.device)
        )
        self.layer_norm_weight.sequence_parallel = (  # type: ignore[attr-defined]
            config.sequence_parallel
        )

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = rms_norm(input_, self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(normed, weight, runtime_gather_output)


class SharedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear some of whose rows are shared by all tensor-parallel ranks.

    One gather of the input and one product serve both kinds of rows: ``weight``
    ``[out/tp, in]`` (varying on tp, rows) and ``shared_weight`` ``[shared, in]`` (replicated on tp:
    every rank computes these outputs for its own heads, so its gradient is partial and is summed,
    see :mod:`nemo_megacpp.mixers.replicated`).

    The product has up to seven rows of zeros more, so that a token's outputs begin at a multiple of
    eight numbers whatever tp leaves; they are no parameters.

    The product is computed in the parameters' dtype under FP8 as well, which is logged once.

    Args:
        input_size: input width.
        output_size: global number of the rows that are split.
        shared_size: number of shared rows.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        shared_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        **kwargs: Any,
    ):
        super().__init__(input_size, output_size, config=config, init_method=init_method, **kwargs)
        assert self.bias is None, "the product below adds no bias"
        self.shared_weight = torch.nn.Parameter(
            torch.empty(
                shared_size, input_size, dtype=config.params_dtype, device=self.weight.device
            )
        )
        if config.perform_initialization:
            # The default generator is seeded alike on all ranks of a tensor-parallel group.
            init_method(self.shared_weight)
        mark_replicated(self.shared_weight, config)
        if config.fp8:
            log_once(
                f"fp8={config.fp8!r}: the input projections of R blocks and Mamba-3 blocks stay in "
                f"{str(config.params_dtype).removeprefix('torch.')}."
            )

    def forward(  # type: ignore[override]
        self, input_: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shared outputs ``[s, b, shared]`` and this rank's, ``[s, b, out/tp]``.

        The input is ``[s, b, in]``, under SP ``[s/tp, b, in]``.
        """
        shared = replicated(self.shared_weight, self.config, self.tp_group)
        sizes = [shared.size(0), self.output_size_per_partition]
        padding = row_padding(sum(sizes))
        rows = torch.cat([shared, self.weight, shared.new_zeros(padding, shared.size(1))])
        output = linear_with_grad_accumulation_and_async_allreduce(
            input_,
            rows,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )
        shared_output, output, _ = output.split([*sizes, padding], dim=-1)
        return shared_output, output
