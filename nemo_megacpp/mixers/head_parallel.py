"""What the mixers of this package share: projections, parameters split by head, their checkpoint.

Split parameters are laid out head by head along their first axis. A tensor-parallel shard is then
one contiguous range of rows, a context-parallel rank's heads are a slice of that range, and a
checkpoint loads at any tensor-parallel size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import Kernel
from nemo_megacpp.mixers.float32 import KeepsFloat32, keep_in_float32
from nemo_megacpp.mixers.replicated import mark_replicated


@dataclass
class MixerSubmodules:
    """The projections of a mixer.

    Attributes:
        in_proj: column-parallel; built with the numbers of input channels and of split rows, and,
            if the mixer has any, of rows that all heads share.
        out_proj: row-parallel.
    """

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class HeadParallelMixer(KeepsFloat32, MegatronModule):
    """The base of a mixer for Megatron's ``MambaLayer`` that splits heads (or channels) over tp.

    Attributes:
        spread: cp ranks that share out the heads of a tensor-parallel rank; 1: CP does not spread
            heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None,
        layer_number: int | None = None,
    ):
        super().__init__(config)
        assert pg_collection is not None, f"{type(self).__name__} needs pg_collection"
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.spread = self.cp_group.size()

    def build_projections(
        self, submodules: MixerSubmodules, d_model: int, rows: int, inner: int, shared_rows: int = 0
    ) -> None:
        """Build ``in_proj`` from ``d_model`` to ``rows`` (and shared rows), and ``out_proj`` from
        ``inner`` to ``d_model``, all sizes those of the whole model."""
        config = self.config
        sizes = (d_model, rows, shared_rows) if shared_rows else (d_model, rows)
        self.in_proj = build_module(
            submodules.in_proj,
            *sizes,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            inner,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.tp_group,
        )

    def split_parameter(
        self, *shape: int, fill: float = 0.0, float32: bool = False
    ) -> torch.nn.Parameter:
        """Return a parameter of this rank's heads, varying on tp along its first axis.

        Args:
            shape: on this rank.
            fill: initial value.
            float32: keep it at least float32 (:mod:`nemo_megacpp.mixers.float32`).
        """
        parameter = self._parameter(shape, fill, float32)
        # Says that the ranks hold different parts; without it the gradient norm counts one of them.
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if float32:
            keep_in_float32(parameter, self.config)
        return parameter

    def replicated_parameter(self, *shape: int, fill: float = 0.0) -> torch.nn.Parameter:
        """Return a parameter that every tensor-parallel rank holds whole and uses for its own
        heads: pass it through :func:`nemo_megacpp.mixers.replicated.replicated` to use it."""
        parameter = self._parameter(shape, fill)
        mark_replicated(parameter, self.config)
        return parameter

    def _parameter(
        self, shape: tuple[int, ...], fill: float, float32: bool = False
    ) -> torch.nn.Parameter:
        dtype, device = self.config.params_dtype, self.in_proj.weight.device
        if float32:
            dtype = torch.promote_types(dtype, torch.float32)
        return torch.nn.Parameter(torch.full(shape, fill, dtype=dtype, device=device))

    def mine(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the part of a split parameter that belongs to this cp rank's heads.

        All cp ranks hold the parameter; the gradients of their slices meet in the sum over the
        data- and context-parallel group.
        """
        if self.spread == 1:
            return parameter
        return parameter.chunk(self.spread)[self.cp_group.rank()]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict: parameters split along their first axis, but for the
        replicated ones."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: 0 for name, p in own.items() if not getattr(p, "sums_over_tp", False)},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded


@torch.no_grad()
def init_step_size_bias(bias: torch.Tensor, low: float = 1e-3, high: float = 0.1) -> None:
    """Draw ``bias`` so that ``softplus(bias)`` is log-uniform in ``[low, high]``, as Mamba does."""
    low, high = math.log(low), math.log(high)
    step = torch.exp(low + (high - low) * torch.rand_like(bias))
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus⁻¹


def choose_triton(
    kernel: Kernel,
    reason: Callable[[], str | None],
    mixer: str,
    setting: str,
    *,
    device: torch.device | None,
    loop: str,
    remedy: str,
) -> bool:
    """Return whether a mixer runs its Triton kernel, and log the choice once: as a warning where
    ``auto`` leaves a GPU to a loop in Python.

    Args:
        kernel: the mixer's setting.
        reason: returns why the Triton kernel cannot run, as what it "needs", or None.
        mixer: its name.
        setting: name of the configuration's field.
        device: where the activations are; None if that is not known yet.
        loop: what the PyTorch form loops over in Python.
        remedy: how to get the Triton kernel.

    Raises:
        UserError: ``kernel`` is ``triton``, which cannot run.
    """
    if kernel == "torch":
        return False
    why = reason()
    if why is None:
        log_once(f"Using the Triton {mixer} kernel.")
    elif kernel == "triton":
        raise UserError(
            f"{setting}='triton' cannot be used: the kernel {why}. Choose 'torch' or 'auto'."
        )
    elif device is not None and device.type == "cuda":
        log_once(
            f"{setting}='auto' runs {mixer} on {device} as a Python loop over {loop}, many times "
            f"slower than its Triton kernel, which {why}. {remedy} {setting}='torch' accepts the "
            f"loop without this warning.",
            logging.WARNING,
        )
    else:
        log_once(f"Using the PyTorch {mixer} kernel (Triton {why}).")
    return why is None


@cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """Log ``message`` with the logger ``nemo_megacpp``, once per process."""
    logging.getLogger("nemo_megacpp").log(level, message)
