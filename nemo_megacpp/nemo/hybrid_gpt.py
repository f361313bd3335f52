"""NeMo's ``GPTModel`` around a hybrid model, its data step and its forward step."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.lightning import io

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.mixers.microbatch import deal_microbatch, run_microbatch
from nemo_megacpp.nemo.loss import HybridLossReduction
from nemo_megacpp.nemo.schedule_length import ScheduleLength
from nemo_megacpp.specs.hybrid_model import build_hybrid_model


def hybrid_data_step(dataloader_iter: Iterator[Any]) -> dict[str, Any]:
    """Return this rank's share of the next microbatch, with packs and side channels, in place of
    NeMo's ``gpt_data_step`` (:func:`nemo_megacpp.mixers.microbatch.deal_microbatch`)."""
    batch = next(dataloader_iter)
    if isinstance(batch, tuple) and len(batch) == 3:  # NeMo's loaders add two numbers
        batch = batch[0]
    return deal_microbatch(batch)


def hybrid_forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Run one microbatch."""
    return run_microbatch(model, batch)


@dataclass
class HybridModelConfig(HybridConfig, io.IOMixin):
    """:class:`HybridConfig` as a NeMo model configuration (it serialises, and builds the model)."""

    forward_step_fn: Callable = hybrid_forward_step
    data_step_fn: Callable = hybrid_data_step

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> torch.nn.Module:
        """Build this rank's pipeline chunk; NeMo calls this once per virtual stage."""
        assert tokenizer.vocab_size == self.vocab_size, (
            f"tokenizer of {tokenizer.vocab_size}, model of {self.vocab_size}: validated earlier"
        )
        stages = self.virtual_pipeline_model_parallel_size or 1
        if vp_stage is None and stages > 1:
            vp_stage = 0  # Lightning builds the first chunk without naming its stage
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            pre_process = pre_process and (vp_stage or 0) == 0
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            post_process = post_process and (vp_stage or 0) == stages - 1
        return build_hybrid_model(
            self,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            backend=self.backend(),
        )

    def backend(self) -> BackendSpecProvider | None:
        """Return the provider of modules; None for this installation's default."""
        return None


class HybridGPTModel(GPTModel):
    """NeMo's ``GPTModel`` around a hybrid model.

    Args:
        config: the model.
        optim: optimizer module; :class:`nemo_megacpp.nemo.hybrid_optimizer.HybridOptimizer`.
        tokenizer: NeMo tokenizer; taken from the data module if not given.
    """

    _training_loss_reduction: Any
    _validation_loss_reduction: Any

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return what tells the schedule the length of the messages between stages."""
        return [ScheduleLength()]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        side_channels: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run this rank's chunk; NeMo's own forward has no argument for side channels."""
        return self.module(
            input_ids,
            position_ids,
            attention_mask,
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=packed_seq_params,
            side_channels=side_channels,
        )

    @property
    def training_loss_reduction(self) -> HybridLossReduction:
        """The mean that a training step minimizes and logs."""
        if not self._training_loss_reduction:
            self._training_loss_reduction = HybridLossReduction(
                self.config.calculate_per_token_loss
            )
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> HybridLossReduction:
        """The mean over all tokens of the held-out rows."""
        if not self._validation_loss_reduction:
            self._validation_loss_reduction = HybridLossReduction(
                self.config.calculate_per_token_loss, validation_step=True
            )
        return self._validation_loss_reduction
