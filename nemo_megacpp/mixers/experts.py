"""Expert weights that are synchronised over the expert groups, and counted, in every layout.

Megatron-Core 0.16.1 tags an expert weight as expert-parallel (``allreduce = False``) only when
EP > 1. With EP=1 and an expert-tensor-parallel degree other than TP, the expert-data-parallel group
differs from the data-parallel one, and a weight tagged as dense is reduced over the wrong one: with
TP=2, ETP=1 its gradient is never summed over the two ranks that see different tokens.

Here every expert weight is tagged, always. Where the groups coincide nothing changes in the
numbers, and the optimizer keeps one structure in all layouts, so that its state can be resharded.

The gradient norm counts a parameter on every rank that holds a part of its own only if it carries
``tensor_model_parallel``. Transformer Engine's grouped linear does not always set it: with EP or
ETP above 1 Megatron-Core builds it without a parallel mode, and Transformer Engine 2.13 and newer
then leave the tags out. The norm would count the experts of the first tensor-parallel rank only,
and clipping would be too weak (pull request 5916 of Megatron-LM). Here every expert weight has it:
the optimizer sums the norm over the expert groups, in which no two ranks hold the same expert
weight.
"""

from __future__ import annotations

from typing import Any

import torch

_tagged: dict[type, type] = {}


def tag_expert_weights(experts: torch.nn.Module) -> None:
    """Send every weight of ``experts`` to the expert groups in DDP and optimizer, and have the
    gradient norm count it on every rank."""
    for name, parameter in experts.named_parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]
        if not getattr(parameter, "tensor_model_parallel", False):
            by_rows = parameter.dim() == 2 and "linear_fc2" in name
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = int(by_rows)  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]


def with_expert_tags(experts: type) -> type:
    """Return a subclass of one of Megatron's expert modules whose weights are tagged.

    Args:
        experts: ``SequentialMLP``, ``GroupedMLP`` or ``TEGroupedMLP``.
    """
    if experts not in _tagged:

        class TaggedExperts(experts):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                tag_expert_weights(self)

        TaggedExperts.__name__ = f"Tagged{experts.__name__}"
        TaggedExperts.__qualname__ = TaggedExperts.__name__
        _tagged[experts] = TaggedExperts
    return _tagged[experts]
