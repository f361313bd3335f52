"""The M mixer in mode ``nemo_native``: Megatron's own ``MambaMixer`` (Mamba-2)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer

from nemo_megacpp.core.layers import (
    PACK_NUMBERS_DOCUMENTS,
    convolution_modules,
    with_documents,
)
from nemo_megacpp.mixers.float32 import KeepsFloat32, keep_in_float32
from nemo_megacpp.mixers.mamba2_state import mamba2_continue, mamba2_state
from nemo_megacpp.mixers.parameter_gather import wait_for_parameters
from nemo_megacpp.mixers.recompute import recomputable
from nemo_megacpp.mixers.sequence_layout import token_order


class Mamba2Mixer(KeepsFloat32, MambaMixer):
    """Megatron's ``MambaMixer``, with ``A_log``, ``dt_bias`` and ``D`` in float32 and correct under
    ``overlap_param_gather``.

    Megatron builds ``A_log`` and ``D`` in float32, and its ``Float16Module`` converts them to
    bfloat16; the kernels take all three in float32. The stock mixer reads the weight and bias of
    ``conv1d`` without calling it, so nothing waits for their gather. In each layer it numbers the
    documents of a pack, for which it waits for the GPU, or from 0.17 on only of a pack that has
    ``total_tokens``. With an inference context it begins at zero, or takes one token.

    Everything else, and every checkpoint key, is the stock mixer's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in (self.A_log, self.dt_bias, self.D):
            keep_in_float32(parameter, self.config)

    @recomputable("mamba")
    def forward(
        self, hidden_states: torch.Tensor, inference_context: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if inference_context is None:
            return super().forward(hidden_states, **kwargs)
        wait_for_parameters(*convolution_modules(self))
        projected, _ = self.in_proj(hidden_states)
        memory = mamba2_state(self, inference_context, projected.size(1))
        return self.out_proj(mamba2_continue(self, projected, memory))

    def _ssm_training(
        self, zxBCdt: torch.Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> torch.Tensor:
        wait_for_parameters(*convolution_modules(self))
        if packed_seq_params is not None and PACK_NUMBERS_DOCUMENTS:
            documents = self._create_packed_seq_idx(packed_seq_params, zxBCdt.size(0))
            packed_seq_params = with_documents(packed_seq_params, documents)
        return super()._ssm_training(zxBCdt, packed_seq_params)

    def _create_packed_seq_idx(
        self, packed_seq_params: PackedSeqParams, total_tokens: int
    ) -> torch.Tensor:
        """Return the document of each token in order, int32 ``[1, s]``; see the stock form."""
        device = packed_seq_params.cu_seqlens_q.device
        documents = token_order(total_tokens, 1, packed_seq_params, device).documents
        if documents is None:
            documents = torch.zeros(total_tokens, device=device)
        return documents.to(torch.int32).unsqueeze(0)
