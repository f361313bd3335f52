"""What a mixer of ours saves: parameters laid out head by head need no factories."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)


def sharded_by_head(
    mixer: torch.nn.Module,
    whole: Collection[str],
    tp_group: torch.distributed.ProcessGroup,
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict | None,
) -> dict[str, Any]:
    """Return the sharded state dict of a mixer and its submodules.

    Args:
        mixer: its own parameters are split over tp along their first axis, in whole heads, so that
            any tensor-parallel size can load them.
        whole: names of its own parameters that every tensor-parallel rank holds entire.
        tp_group: the tensor-parallel group.
        prefix, sharded_offsets, metadata: as in Megatron's ``sharded_state_dict``.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    own: dict[str, Any] = {}
    mixer._save_to_state_dict(own, "", keep_vars=True)
    sharded = make_sharded_tensors_for_checkpoint(
        own,
        prefix,
        {name: 0 for name in own if name not in whole},
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    for name, module in mixer.named_children():
        sharded.update(
            sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group
            )
        )
    return sharded
