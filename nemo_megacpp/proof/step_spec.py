"""What the training steps of a proof compute, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Objective = Literal["loss", "logits"]
Dtype = Literal["float64", "float32", "bfloat16"]
LossMask = Literal["all", "uneven"]


@dataclass(frozen=True)
class StepSpec:
    """What a step computes, whatever the layout.

    Attributes:
        model: fields of :class:`HybridConfig`, without the layout's.
        micro_batch_size, global_batch_size: rows per microbatch and per step.
        steps: optimizer steps.
        objective: ``loss`` is Megatron's cross entropy (which computes in float32); ``logits`` is a
            fixed linear form of the logits of each token, exact in the model's own dtype. Both are
            averaged over tokens as a run's loss is.
        dtype: of parameters and activations; ``bfloat16`` is Megatron's mixed precision: gradients
            are accumulated and reduced, and the optimizer steps, in float32.
        seed: of tokens and initial weights.
        learning_rate: of Adam.
        loss_mask: ``uneven`` masks the loss of tokens so that no two rows, and no two parts of a
            row over cp, have equally many left.
        documents: lengths of the documents that each row packs; empty for rows of one document.
        starved_experts: experts whose routing bias is set so low that no token reaches them.
        use_distributed_optimizer: shard the optimizer's state over data-parallel ranks; not in
            float64, which Megatron's distributed optimizer does not accept.
        ddp: further fields of Megatron's ``DistributedDataParallelConfig``; by default a run's,
            which overlaps the reduction of gradients and the gather of parameters.
        optimizer: further fields of Megatron's ``OptimizerConfig``.
    """

    model: dict[str, Any]
    micro_batch_size: int = 1
    global_batch_size: int = 4
    steps: int = 1
    objective: Objective = "loss"
    dtype: Dtype = "float32"
    seed: int = 7
    learning_rate: float = 1e-2
    loss_mask: LossMask = "all"
    documents: tuple[int, ...] = ()
    starved_experts: tuple[int, ...] = ()
    use_distributed_optimizer: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def documents_of(self, row: int) -> tuple[int, ...]:
        """Return the lengths of the documents of a row: every other one has them in reverse."""
        return self.documents[:: -1 if row % 2 else 1]

    @property
    def clip_grad(self) -> float:
        """The bound on the gradient norm. Megatron computes the norm in float32, and clipping would
        bring its rounding into a float64 step: there the bound is too high to be reached."""
        return 1.0 if self.objective == "loss" else 1e9
