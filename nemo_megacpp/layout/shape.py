"""What a layout needs to know of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.pattern import HybridPattern


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model and its batch that a layout must divide.

    Sizes of a family are read only if the pattern holds the family; ``None`` is then a violation,
    except ``num_query_groups`` (None: one per head, as in Megatron) and the shared expert's size
    (None or 0: no shared expert). ``make_vocab_size_divisible_by`` of None or 0 turns padding off.
    A sequence length or batch size of None is not decided yet, and not checked.

    """

    pattern: HybridPattern
    hidden_size: int
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    mamba_num_heads: int | None = None
    mamba_num_groups: int | None = None
    m2rnn_num_heads: int | None = None
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    vocab_size: int = 0
    make_vocab_size_divisible_by: int | None = None
    seq_length: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None

    @classmethod
    def read(
        cls, model: Mapping[str, Any], micro_batch_size: int | None, global_batch_size: int | None
    ) -> ModelShape:
        """Return the shape of a model.

        Args:
            model: ``pattern`` and fields of :class:`nemo_megacpp.config.HybridConfig`.
            micro_batch_size, global_batch_size: rows of a microbatch and of a step.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        sizes = {name: value for name, value in model.items() if name in names}
        return cls(
            **{
                **sizes,
                "micro_batch_size": micro_batch_size,
                "global_batch_size": global_batch_size,
            }
        )
