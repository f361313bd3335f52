"""Parameters that are read outside the forward pass of the module that owns them.

With ``overlap_param_gather``, Megatron's ``DistributedDataParallel`` gathers the parameters of the
distributed optimizer while the model runs. It waits for a bucket in a forward pre-hook of the
modules whose parameters the bucket holds. For a module that is never called it does not wait, and
whoever reads the parameters would get those of the previous step.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import distributed_data_parallel


def wait_for_parameters(*modules: torch.nn.Module) -> None:
    """Wait until the parameters that ``modules`` own themselves are gathered.

    Calls the forward pre-hooks of Megatron's ``DistributedDataParallel``, and no others, as
    Megatron does before it replays a CUDA graph (``CudaGraphManager.call_ddp_preforward_hook``).
    Call it where the modules would have been called: a wait also starts the gather of the next
    bucket. Does nothing without ``overlap_param_gather``.
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if hook.__module__ == distributed_data_parallel.__name__:
                hook(module)
