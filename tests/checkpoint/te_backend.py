"""Modules that save what Transformer Engine's save, without it.

Each adds to a torch module what a sharded state dict of Transformer Engine has beside: the object
``_extra_state``, bytes in a tensor. The experts are one module with ``weight0``, ``weight1``, …
inside Megatron's own ``TEGroupedMLP``.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional as F

from nemo_megacpp.core.moe import experts_of
from nemo_megacpp.mixers.core_attention import TorchCoreAttention
from nemo_megacpp.mixers.experts import with_expert_tags
from nemo_megacpp.mixers.linear import NormColumnParallelLinear
from nemo_megacpp.mixers.norm import TorchRMSNorm
from nemo_megacpp.specs.backend import TorchBackend

SCALES = {"scale_fwd": 3}


class _ExtraState:
    """Transformer Engine's way: bytes when saved; None or bytes when loaded."""

    scales: dict[str, int] | None = SCALES

    def get_extra_state(self) -> torch.Tensor:
        state = pickle.dumps(self.scales)
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        self.scales = None if state is None else pickle.loads(state.numpy().tobytes())


class Norm(_ExtraState, TorchRMSNorm):
    pass


class Column(_ExtraState, ColumnParallelLinear):
    pass


class NormColumn(_ExtraState, NormColumnParallelLinear):
    pass


class Row(_ExtraState, RowParallelLinear):
    pass


class CoreAttention(_ExtraState, TorchCoreAttention):
    pass


class _Grouped(_ExtraState, torch.nn.Module):
    """``GroupedLinear``: one weight per local expert, ``[out, in]``, split over ETP on one axis.

    The weights carry no tags, as those of Transformer Engine 2.13 with EP or ETP above 1.
    """

    axis: int

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, pg_collection: Any, **_: Any
    ):
        super().__init__()
        self.num_gemms, self.groups = num_gemms, pg_collection
        size = [output_size, input_size]
        size[self.axis] //= pg_collection.expt_tp.size()
        for gemm in range(num_gemms):
            self.register_parameter(f"weight{gemm}", torch.nn.Parameter(torch.randn(size)))

    def forward(self, x: torch.Tensor, splits: list[int]) -> tuple[torch.Tensor, None]:
        """Multiply the tokens ``[t, in]`` of each expert, ``splits`` in number, by its weight."""
        parts = zip(x.split(splits), self.parameters(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> dict[str, Any]:
        first = self.groups.ep.rank() * self.num_gemms
        experts = self.groups.ep.size() * self.num_gemms
        sharded = {}
        for gemm in range(self.num_gemms):
            own = {
                "weight": getattr(self, f"weight{gemm}"),
                "_extra_state": self.get_extra_state(),
            }
            found = make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                {"weight": self.axis},
                (*sharded_offsets, (len(sharded_offsets), first + gemm, experts)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for value in found.values():
                value.replica_id = (*value.replica_id[:2], self.groups.expt_dp.rank())
            sharded[f"{prefix}weight{gemm}"] = found[f"{prefix}weight"]
            which = "" if gemm == 0 else gemm
            sharded[f"{prefix}_extra_state{which}"] = found[f"{prefix}_extra_state"]
        return sharded


class GroupedColumn(_Grouped):
    axis = 0


class GroupedRow(_Grouped):
    axis = 1


class TransformerEngineNames(TorchBackend):
    """The torch backend's modules, saving what Transformer Engine's save."""

    def column_parallel_linear(self) -> type:
        return Column

    def row_parallel_linear(self) -> type:
        return Row

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumn

    def layer_norm(self, *args: Any, **kwargs: Any) -> type:
        return Norm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:
        submodules = MLPSubmodules(linear_fc1=GroupedColumn, linear_fc2=GroupedRow)
        return experts_of(with_expert_tags(TEGroupedMLP), submodules)
