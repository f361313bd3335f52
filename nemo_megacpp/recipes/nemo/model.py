"""The model as NeMo trains it: our configuration inside NeMo's ``GPTModel``."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import GPTModel, gpt_data_step
from nemo.lightning import OptimizerModule, io

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.specs.model import build_hybrid_model


def hybrid_forward_step(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run one microbatch; attention is causal by its mask type, so no mask is passed."""
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
    )


@dataclass
class HybridModelConfig(HybridConfig, io.IOMixin):
    """:class:`HybridConfig` as a NeMo model configuration (it serialises, and builds the model)."""

    forward_step_fn: Callable = hybrid_forward_step
    data_step_fn: Callable = gpt_data_step

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> torch.nn.Module:
        """Build this rank's pipeline chunk; NeMo calls this once per virtual stage."""
        assert tokenizer.vocab_size == self.vocab_size, (
            f"tokenizer of {tokenizer.vocab_size}, model of {self.vocab_size}: the launcher checks"
        )
        stages = self.virtual_pipeline_model_parallel_size or 1
        if vp_stage is None and stages > 1:
            vp_stage = 0  # Lightning has the first chunk built, and does not know of stages
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            pre_process = pre_process and (vp_stage or 0) == 0
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            post_process = post_process and (vp_stage or 0) == stages - 1
        return build_hybrid_model(
            self, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )


class HybridModel(GPTModel):
    """NeMo's ``GPTModel`` around a hybrid A/M/E/R model.

    Args:
        config: the model.
        optim: optimizer module; :class:`nemo_megacpp.recipes.nemo.optimizer.HybridOptimizer`.
        tokenizer: NeMo tokenizer; taken from the data module if not given.
    """

    def __init__(
        self,
        config: HybridModelConfig,
        optim: OptimizerModule | None = None,
        tokenizer: Any = None,
        model_transform: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
    ):
        super().__init__(config, optim=optim, tokenizer=tokenizer, model_transform=model_transform)
