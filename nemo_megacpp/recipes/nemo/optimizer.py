"""NeMo's Megatron optimizer module on Megatron-Core 0.16."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from typing import Any

from megatron.core.optimizer import get_megatron_optimizer
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning import MegatronOptimizerModule
from nemo.utils import AppState


class HybridOptimizer(MegatronOptimizerModule):
    """``MegatronOptimizerModule`` without the three arguments that Megatron-Core 0.16 dropped.

    NeMo 2.7.3 passes ``no_weight_decay_cond``, ``scale_lr_cond`` and ``lr_mult`` to
    ``get_megatron_optimizer``, a TypeError on any device. Megatron's own rule stands in their
    place: no weight decay on biases and vectors.
    """

    def optimizers(self, model: Any) -> list[McoreDistributedOptimizer]:
        """Build the optimizer of all model chunks."""
        optimizer = get_megatron_optimizer(
            self.config,
            [chunk.module for chunk in model],
            use_gloo_process_groups=AppState().use_gloo_process_groups,
        )
        for group in optimizer.param_groups:
            # Megatron's scheduler applies these factors at every step; NeMo's does not.
            group["lr"] *= group["lr_mult"]
            group["weight_decay"] *= group["wd_mult"]
        return [McoreDistributedOptimizer(optimizer)]
