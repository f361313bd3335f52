"""Torch forms of the kernels that Megatron-Core 0.16.1 calls by module-level names.

The no-GPU host uses them, and proofs in float64 or float32 on GPUs: causal_conv1d, mamba_ssm and
Transformer Engine have no float64, and round float32 to TF32 in places.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.mixers.kernels.gated_rms_norm import RMSNormGated
from nemo_megacpp.mixers.kernels.mamba_split_conv1d_scan import mamba_split_conv1d_scan
from nemo_megacpp.mixers.kernels.selective_state_update import selective_state_update
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked
from nemo_megacpp.mixers.sequence_layout import token_order


def use_torch_forms() -> None:
    """Put every torch form in place for the rest of this process, and turn TF32 off.

    For processes that end with their proof. Transformer Engine's modules are replaced by the
    backend, not here. **Not run on a GPU yet.**
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    install_mamba_kernels()
    install_clipping()
    _install_optimizer()
    from megatron.core.transformer.moe import moe_utils

    router: Any = moe_utils
    router.te_general_gemm = None  # rounds float32 to TF32


def install_mamba_kernels() -> None:
    """Give ``MambaMixer`` torch forms of the Triton and CUDA kernels that it calls by name."""
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class ExtendedRMSNorm(RMSNormGated):
        """Stock ``ExtendedRMSNorm`` derives from the kernel's class."""

        tp_group: Any = None

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
        ) -> dict:
            from megatron.core import parallel_state

            group = self.tp_group or parallel_state.get_tensor_model_parallel_group()
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=group,
                dp_cp_group=metadata["dp_cp_group"],
            )

    module: Any = mamba_mixer
    module.HAVE_MAMBA_SSM = True
    module.RMSNormGated = RMSNormGated
    module.ExtendedRMSNorm = ExtendedRMSNorm
    module.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan
    module.mamba_chunk_scan_combined = ssd_chunked
    module.selective_state_update = selective_state_update
    # The torch forms reset state and convolution at document boundaries (seq_idx).
    module._check_mamba_sequence_packing_support = lambda for_inference_not_training=True: (
        (False, "the torch forms have no inference kernels")
        if for_inference_not_training
        else (True, None)
    )
    # Under context parallelism the mixer reads the order of a pack from Transformer Engine.
    context_parallel: Any = mamba_context_parallel
    context_parallel.tex = SimpleNamespace(thd_get_partitioned_indices=_tokens_of_rank)
    context_parallel.is_te_min_version = lambda version, check_equality=True: True


def _tokens_of_rank(
    cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int
) -> torch.Tensor:
    """Transformer Engine's ``thd_get_partitioned_indices``, a CUDA kernel."""
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens)
    return token_order(total_tokens, world_size, packed, cu_seqlens.device).of_rank(rank).int()


def install_clipping() -> None:
    """Make Megatron clip gradients that are not ``torch.cuda.FloatTensor``."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    modules: list[Any] = [clip_grads, distrib_optimizer, optimizer]
    for module in modules:
        if hasattr(module, "clip_grad_by_total_norm_fp32"):
            module.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm


def _clip_grad_by_total_norm(
    parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Stock form asserts that gradients are ``torch.cuda.FloatTensor``; same arithmetic."""
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    grads = [g.detach() for p in parameters if (g := getattr(p, name, None)) is not None]
    coefficient = max_norm / (total_norm + 1.0e-6)
    if grads and coefficient < 1.0:
        torch._foreach_mul_(grads, coefficient)


def _install_optimizer() -> None:
    """Give Megatron's optimizers torch's Adam, and its own forms of the kernels over many tensors:
    Transformer Engine's take no float64."""
    from megatron.core import optimizer as optimizers
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.utils import (
        local_multi_tensor_applier,
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )

    package: Any = optimizers
    package.Adam, package.SGD = torch.optim.AdamW, torch.optim.SGD
    package.USING_PYTORCH_OPTIMIZER = True
    modules: list[Any] = [clip_grads, optimizer]
    for module in modules:
        module.multi_tensor_applier = local_multi_tensor_applier
        module.multi_tensor_scale_impl = local_multi_tensor_scale
    modules[0].l2_norm_impl = local_multi_tensor_l2_norm
