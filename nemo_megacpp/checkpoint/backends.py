"""Load a checkpoint of one backend into a model of another: where their saved names differ.

The torch backend has Transformer Engine's parameter names, and Megatron saves the experts of all
its expert modules in one layout, so the tensors are the same in both. What differs:

* ``_extra_state``, an object per module with FP8 scales. Transformer Engine's norms and attention
  have one, torch's have none; its linears' are bytes, torch's are None.
* In Megatron's own unfused ("local") specs a norm is a module before the linear that follows it:
  ``input_layernorm.weight`` for ``self_attention.linear_qkv.layer_norm_weight``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nemo_megacpp.checkpoint.safe_pickle import EXTRA_STATE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from torch.distributed.checkpoint.metadata import Metadata

# Fused and unfused name, between the layer's number and "weight" or "bias".
_NAMES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mixer.in_proj.layer_norm_", "norm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
_KEY = re.compile(r"(?P<layer>.*\blayers\.\d+\.)(?P<rest>.*)(?P<which>weight|bias)")


def other_name(key: str) -> str | None:
    """Return the unfused name of a norm for its fused one, and the reverse; else None.

    Names of optimizer states end with the parameter's, and are renamed alike.
    """
    found = _KEY.fullmatch(key)
    for fused, unfused in _NAMES if found else ():
        assert found is not None
        for one, other in ((fused, unfused), (unfused, fused)):
            if found["rest"] == one:
                return f"{found['layer']}{other}{found['which']}"
    return None


def fit_to_checkpoint(
    sharded_state_dict: dict[str, Any], metadata: Metadata, *, new_side_channels: bool = False
) -> None:
    """Give the model's tensors the names that they have in the checkpoint, in place.

    A module's ``_extra_state`` that was not saved is left as it is. Any other tensor that the
    checkpoint lacks remains an error of the load.

    Args:
        sharded_state_dict: of the model, and of its optimizer, about to be loaded.
        metadata: of the checkpoint.
        new_side_channels: leave the tensors of side channels, too, as they are where the checkpoint
            has none of their name and shape.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import (
        LocalNonpersistentObject,
        ShardedObject,
        ShardedTensor,
    )

    saved = metadata.state_dict_metadata

    def fit(value: Any) -> Any:
        if isinstance(value, ShardedObject) and EXTRA_STATE in value.key:
            return value if value.unique_key in saved else LocalNonpersistentObject(value.data)
        if new_side_channels and isinstance(value, ShardedTensor) and _is_new_channel(value, saved):
            return LocalNonpersistentObject(value.data)
        if isinstance(value, ShardedTensor) and value.key not in saved:
            other = other_name(value.key)
            if other in saved:
                value.key = other
        return value

    dict_list_map_inplace(fit, sharded_state_dict)


def _is_new_channel(value: ShardedTensor, saved: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to side channels and the checkpoint has no such tensor."""
    size = getattr(saved.get(value.key), "size", None)
    known = size is not None and tuple(size) == tuple(value.global_shape)
    return in_side_channels(value.key) and not known


def in_side_channels(key: str) -> bool:
    """Return whether a tensor's name is of side channels."""
    return "side_channels" in key.split(".")
