"""What Megatron-Core 0.16.1 needs beyond :mod:`cpu_torch` to run without a GPU.

Every entry replaces a module-level name of Megatron-Core by a form that does the same on the CPU,
and says why the stock form cannot run there. The classes themselves stay untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.mixers.kernels.gated_rms_norm import RMSNormGated
from nemo_megacpp.mixers.kernels.mamba_split_conv1d_scan import mamba_split_conv1d_scan
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked
from nemo_megacpp.mixers.sequence_layout import token_order


def _rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _split_sizes_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stock form converts only CUDA tensors; gloo's all-to-all wants numbers, not a tensor."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor


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


def _gather_uneven(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gloo gathers equal sizes only; ranks whose experts got different token counts differ."""

    def gather(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: Any = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return stock(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        longest = max(sizes)
        padded = input_.new_zeros((longest, *input_.shape[1:]))
        padded[: input_.size(0)] = input_
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    return gather


def _reduce_scatter_uneven(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As :func:`_gather_uneven`, the other way."""

    def reduce_scatter(
        input_: torch.Tensor,
        group: Any,
        input_split_sizes: Any = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return stock(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    return reduce_scatter


def _type_as_on_cuda(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's mixed-precision optimizers sort parameters by ``tensor.type()``, and know only the
    names of CUDA tensors."""

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = stock(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    return type_name


def _tokens_of_rank(
    cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int
) -> torch.Tensor:
    """Transformer Engine's ``thd_get_partitioned_indices``, a CUDA kernel."""
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens)
    return token_order(total_tokens, world_size, packed, cu_seqlens.device).of_rank(rank).int()


class _QuietAboutOneGenerator(logging.Filter):
    """Drop Megatron's warning that the CPU generator moved inside a CUDA fork: here it is one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _install_mamba_kernels() -> None:
    """Give ``MambaMixer`` torch forms of the Triton and CUDA kernels that it calls by name."""
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class ExtendedRMSNorm(RMSNormGated):
        """Stock ``ExtendedRMSNorm`` derives from the kernel's class, absent on this host."""

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
    # The torch forms reset state and convolution at document boundaries (seq_idx).
    module._check_mamba_sequence_packing_support = lambda for_inference_not_training=True: (
        (False, "the no-GPU host has no inference kernels")
        if for_inference_not_training
        else (True, None)
    )
    # Under context parallelism the mixer asks Transformer Engine for the order of a pack.
    context_parallel: Any = mamba_context_parallel
    context_parallel.tex = SimpleNamespace(thd_get_partitioned_indices=_tokens_of_rank)
    context_parallel.is_te_min_version = lambda version, check_equality=True: True


def install() -> None:
    """Install the replacements. Called once, by :func:`nemo_megacpp.runtime.host.ensure_host`."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    modules: list[Any] = [clip_grads, distrib_optimizer, optimizer]
    for module in modules:
        if hasattr(module, "clip_grad_by_total_norm_fp32"):
            module.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm
    tensor: Any = torch.Tensor
    tensor.type = _type_as_on_cuda(tensor.type)
    regions: Any = mappings
    regions._gather_along_first_dim = _gather_uneven(regions._gather_along_first_dim)
    regions._reduce_scatter_along_first_dim = _reduce_scatter_uneven(
        regions._reduce_scatter_along_first_dim
    )
    rng: Any = random
    rng._get_cuda_rng_state = _rng_state
    rng._set_cuda_rng_state = _set_rng_state
    logging.getLogger(random.__name__).addFilter(_QuietAboutOneGenerator())
    if not hasattr(random, "FP8GlobalStateManager"):
        # What is recomputed asks Transformer Engine whether FP8 is on.
        rng.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        rng.activation_recompute_forward = lambda **_: nullcontext()
        rng.fp8_autocast = lambda **_: nullcontext()
    moe: list[Any] = [moe_utils, token_dispatcher]
    for module in moe:
        module.maybe_move_tensor_to_cpu = _split_sizes_on_host
    if not hasattr(moe_utils, "te_general_gemm"):
        moe[0].te_general_gemm = None
    _install_mamba_kernels()
