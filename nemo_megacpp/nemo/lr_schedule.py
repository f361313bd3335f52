"""Megatron's learning-rate schedules for NeMo's trainer."""

# NeMo-Run reads these annotations at run time (optim.lr_scheduler.max_steps=3), so they are not
# postponed, and it knows Optional[int], but not "int | None".
# ruff: noqa: UP045

import logging
from dataclasses import dataclass
from typing import Any, Optional

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from nemo.lightning import LRSchedulerModule
from torch.optim.lr_scheduler import LRScheduler

from nemo_megacpp.errors import UserError

_logger = logging.getLogger("nemo_megacpp")


class MegatronSchedule(OptimizerParamScheduler, LRScheduler):
    """Megatron's scheduler, counting optimizer steps. An ``LRScheduler`` only in name: Lightning
    saves and steps no others."""

    def step(self, increment: int = 1) -> None:  # type: ignore[override]
        """Set learning rate and weight decay of the next step.

        Args:
            increment: optimizer steps that were made.
        """
        super().step(increment)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the checkpoint's step, on the schedule of this run's settings."""
        own = {key: value for key, value in self.state_dict().items() if key != "num_steps"}
        changed = [
            f"{key} {state_dict[key]} -> {value}"
            for key, value in own.items()
            if state_dict.get(key, value) != value
        ]
        if changed:
            _logger.info("the schedule differs from the checkpoint's: %s", ", ".join(changed))
        self.num_steps = 0
        # A torch scheduler, as NeMo's are, counts in last_epoch.
        self.step(state_dict["num_steps" if "num_steps" in state_dict else "last_epoch"])


@dataclass(eq=False)
class MegatronScheduler(LRSchedulerModule):
    """Schedule of Megatron's ``OptimizerParamScheduler``, once per optimizer step.

    Peak, minimum and weight decay are those of the optimizer's configuration.

    Attributes:
        max_steps: length of the schedule; NeMo sets it to the trainer's.
        warmup_steps: of linear warm-up.
        warmup_init: learning rate of the first step of the warm-up; None: the peak divided by
            ``warmup_steps + 1``, as in NeMo's schedulers.
        decay_style: Megatron's ``lr_decay_style``.
        wsd_decay_steps: with ``WSD``, the last steps, in which the learning rate decays.
        wsd_decay_style: with ``WSD``, Megatron's ``lr_wsd_decay_style``.
    """

    max_steps: int
    warmup_steps: int = 0
    warmup_init: Optional[float] = None
    decay_style: str = "cosine"
    wsd_decay_steps: Optional[int] = None
    wsd_decay_style: str = "exponential"

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:
        """Return Lightning's configuration of the schedule of one optimizer.

        Raises:
            UserError: the minimum of the learning rate is above its peak.
        """
        config = optimizers.mcore_optimizer.config
        if config.min_lr > config.lr:
            raise UserError(f"min_lr: {config.min_lr} is above lr={config.lr}, the peak.")
        default_init = config.lr / (self.warmup_steps + 1)
        schedule = MegatronSchedule(
            optimizers,
            init_lr=default_init if self.warmup_init is None else self.warmup_init,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=self.warmup_steps,
            # The trainer's max_steps may have been lowered since; Megatron asserts more.
            lr_decay_steps=max(self.max_steps, self.warmup_steps + 1),
            lr_decay_style=self.decay_style,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            wsd_decay_steps=self.wsd_decay_steps,
            lr_wsd_decay_style=self.wsd_decay_style,
        )
        return {
            "optimizer": optimizers,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
        }
