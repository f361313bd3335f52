"""The deal of a batch over context-parallel ranks."""

from __future__ import annotations

from inspect import signature
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.distributed import ProcessGroup

_PLAIN: dict[str, Any] = (
    {"is_hybrid_cp": False}
    if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters
    else {}
)


def deal_over_cp(batch: dict[str, Any], cp_group: ProcessGroup | None = None) -> dict[str, Any]:
    """Return this cp rank's share of a batch of rows of one document each.

    The group is always named, and by keyword: from 0.18 on the second positional argument of
    Megatron's function is another one, and no group means all ranks of the world there, so that
    TP=2 would halve every sequence without an error.

    Args:
        batch: tensors ``[b, s, …]`` by name, or None.
        cp_group: Megatron's context-parallel group if not given.
    """
    if cp_group is None:
        cp_group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(dict(batch), cp_group=cp_group, **_PLAIN)
