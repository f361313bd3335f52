"""What Megatron-Core 0.16.1 needs beyond :mod:`cpu_torch` to run without a GPU.

Every entry replaces a name of Megatron-Core by a form that computes the same on the CPU, and says
why the stock form cannot run there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from nemo_megacpp.core.fsdp import problem_with_fsdp
from nemo_megacpp.runtime import cpu_fsdp
from nemo_megacpp.runtime.cpu_collectives import one_by_one
from nemo_megacpp.runtime.torch_forms import install_clipping, install_mamba_kernels


def _rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _split_sizes_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stock form converts only CUDA tensors; gloo's all-to-all takes numbers, not a tensor."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor


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


def _is_there(tensor: torch.Tensor | None) -> None:
    """Stock form asserts that what inference sends is on a GPU as well."""
    assert tensor is not None


def _init_data_here(stock: Callable[..., None]) -> Callable[..., None]:
    """``ShardedTensor.init_data`` took ``torch.empty`` as its default before the stand-in was put
    in its place, and Megatron's parallel loading asks for tensors on ``"cuda"``."""

    def init_data(self: Any, device: Any, init_fn: Callable[..., Any] | None = None) -> None:
        stock(self, device, init_fn or torch.empty)

    return init_data


def _type_as_on_cuda(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's mixed-precision optimizers sort parameters by ``tensor.type()``, and accept only
    the names of CUDA tensors."""

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = stock(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    return type_name


class _QuietAboutOneGenerator(logging.Filter):
    """Drop Megatron's warning that the CPU generator moved inside a CUDA fork: here it is one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install() -> None:
    """Install the replacements. Called once, by :func:`nemo_megacpp.runtime.host.ensure_host`."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.inference import communication_utils
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    install_clipping()
    sharded_tensor: Any = ShardedTensor
    sharded_tensor.init_data = _init_data_here(sharded_tensor.init_data)
    tensor: Any = torch.Tensor
    tensor.type = _type_as_on_cuda(tensor.type)
    buffers: Any = param_and_grad_buffer
    buffers._coalescing_manager = one_by_one
    sent: Any = communication_utils
    sent._is_cuda = _is_there
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
        # Recomputation checks whether FP8 is on in Transformer Engine.
        rng.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        rng.activation_recompute_forward = lambda **_: nullcontext()
        rng.fp8_autocast = lambda **_: nullcontext()
    moe: list[Any] = [moe_utils, token_dispatcher]
    for module in moe:
        module.maybe_move_tensor_to_cpu = _split_sizes_on_host
    if not hasattr(moe_utils, "te_general_gemm"):
        moe[0].te_general_gemm = None
    install_mamba_kernels()
    if problem_with_fsdp() is None:
        cpu_fsdp.install()
