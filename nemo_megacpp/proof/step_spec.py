"""What one training step of the proof computes, apart from the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Objective = Literal["loss", "logits"]
Dtype = Literal["float64", "float32", "bfloat16"]


@dataclass(frozen=True)
class StepSpec:
    """What one step computes, apart from the layout.

    Attributes:
        model: fields of :class:`HybridConfig`, without the layout's.
        micro_batch_size, global_batch_size: rows per microbatch and per step.
        objective: ``loss`` is Megatron's cross entropy (which computes in float32); ``logits`` is a
            fixed random linear form of the logits, exact in the model's own dtype.
        dtype: of parameters and activations; ``bfloat16`` is Megatron's mixed precision: gradients
            are accumulated and reduced, and the optimizer steps, in float32.
        seed: of tokens, initial weights and the linear form.
        learning_rate: of the one Adam step.
        documents: lengths of the documents that each row packs; empty for rows of one document.
        starved_experts: experts whose routing bias is set so low that no token reaches them.
        use_distributed_optimizer: shard the optimizer's state over data-parallel ranks.
    """

    model: dict[str, Any]
    micro_batch_size: int = 1
    global_batch_size: int = 4
    objective: Objective = "loss"
    dtype: Dtype = "float32"
    seed: int = 7
    learning_rate: float = 1e-2
    documents: tuple[int, ...] = ()
    starved_experts: tuple[int, ...] = ()
    use_distributed_optimizer: bool = False

    @property
    def clip_grad(self) -> float:
        """Megatron computes the gradient norm in float32, so clipping by it would bring float32
        rounding into a float64 step: there the bound is out of reach."""
        return 1.0 if self.objective == "loss" else 1e9
