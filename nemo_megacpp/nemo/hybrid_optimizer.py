"""NeMo's optimizer module for Megatron-Core 0.16, with state that any layout can load."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed, and it
# knows Optional[int], but not "int | None".
# ruff: noqa: UP045

from collections.abc import Callable
from typing import Any, Optional

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning import LRSchedulerModule, MegatronOptimizerModule
from nemo.utils import AppState

from nemo_megacpp.checkpoint.optimizer_state import (
    load_optimizer_state_dict,
    optimizer_sharded_state_dict,
    validate_optimizer_form,
)
from nemo_megacpp.errors import UserError
from nemo_megacpp.settings.validate import validate_config

_SETTINGS = ("betas", "eps", "weight_decay", "max_lr", "min_lr")
"""Of a parameter group; a checkpoint has those of the run that saved it."""


class ReshardableOptimizer(McoreDistributedOptimizer):
    """NeMo's wrapper of a Megatron optimizer; saves and loads its state in the form of
    :mod:`nemo_megacpp.checkpoint.optimizer_state` instead of Megatron's."""

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        optimizer_state_dict: Any = None,
        is_loading: bool = False,
        dist_ckpt_parallel_save: Any = None,
        metadata: Any = None,
    ) -> dict[str, Any]:
        """Return the sharded state; see :func:`optimizer_sharded_state_dict`.

        Args:
            model_sharded_state_dict: of all model chunks.
            optimizer_state_dict, dist_ckpt_parallel_save: unused.
            is_loading: whether the result will be filled from a checkpoint.
            metadata: content metadata, of the checkpoint when loading.

        Raises:
            UserError: the checkpoint's optimizer state has another form; nothing is loaded then.
        """
        if is_loading:
            validate_optimizer_form(metadata)
        return optimizer_sharded_state_dict(
            self.mcore_optimizer, model_sharded_state_dict, is_loading=is_loading
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that a checkpoint has filled; the settings stay those of this run."""
        own = [
            {key: group[key] for key in _SETTINGS if key in group} for group in self.param_groups
        ]
        load_optimizer_state_dict(self.mcore_optimizer, state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings)


class HybridOptimizer(MegatronOptimizerModule):
    """``MegatronOptimizerModule`` without the three arguments that Megatron-Core 0.16 dropped.

    NeMo 2.7.3 passes ``no_weight_decay_cond``, ``scale_lr_cond`` and ``lr_mult`` to
    ``get_megatron_optimizer``, which raises a TypeError. Megatron's own rule holds instead: no
    weight decay on biases and vectors.

    Args:
        config: of Megatron's optimizer.
        lr_scheduler: :class:`nemo_megacpp.nemo.lr_schedule.MegatronScheduler`, or one of NeMo's.
        no_weight_decay_cond: must stay unset.
        scale_lr_cond: must stay unset.
        lr_mult: must stay at 1.

    Raises:
        UserError: a setting of the optimizer that is neither proved nor neutral, or one that
            Megatron-Core 0.16 no longer takes.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        lr_scheduler: Optional[LRSchedulerModule] = None,
        no_weight_decay_cond: Optional[Callable] = None,
        scale_lr_cond: Optional[Callable] = None,
        lr_mult: float = 1.0,
    ):
        for name, value, usual in (
            ("no_weight_decay_cond", no_weight_decay_cond, None),
            ("scale_lr_cond", scale_lr_cond, None),
            ("lr_mult", lr_mult, 1.0),
        ):
            if value != usual:
                raise UserError(
                    f"optim.{name}={value!r}: Megatron-Core 0.16 no longer takes it. "
                    f"Legal: {usual!r}."
                )
        validate_config(config)
        super().__init__(config, lr_scheduler=lr_scheduler)

    def optimizers(self, model: Any) -> list[McoreDistributedOptimizer]:
        """Build the optimizer of all model chunks."""
        optimizer = get_megatron_optimizer(
            self.config,
            [chunk.module for chunk in model],
            use_gloo_process_groups=AppState().use_gloo_process_groups,
        )
        for group in optimizer.param_groups:
            # Megatron's scheduler applies these factors at every step; NeMo's own do not.
            group["lr"] *= group["lr_mult"]
            group["weight_decay"] *= group["wd_mult"]
        return [ReshardableOptimizer(optimizer)]
