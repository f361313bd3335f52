"""Multi-token prediction: Megatron's block of it, around layers of ours.

Depth ``k`` predicts the token ``k + 1`` places ahead: it normalizes the hidden states of the depth
before it and the embedding of the token ``k`` places ahead, concatenates and projects them, runs
its own layers and a norm, and uses the model's head. Megatron's hybrid model has it from 0.17 on
(``megatron/core/transformer/multi_token_prediction.py``); the layers that it builds inside are its
own stack's, so :class:`PredictionLayer` puts others in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction as megatron
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.distributed import ProcessGroup

from nemo_megacpp.core.releases import imported

HAS_PREDICTION = (
    "hybrid_submodules" in signature(megatron.MultiTokenPredictionLayer.__init__).parameters
)
"""Whether Megatron's hybrid model builds prediction depths."""


def missing_prediction() -> str | None:
    """Return why this release has no multi-token prediction for hybrid models; None if it has."""
    if HAS_PREDICTION:
        return None
    return (
        f"MambaModel of the installed Megatron-Core {imported()} has no multi-token prediction "
        f"(only its GPTModel has); HybridModel of 0.19 has it"
    )


class PredictionLayer(megatron.MultiTokenPredictionLayer):
    """One depth: Megatron's ``MultiTokenPredictionLayer`` around layers that ``build_layers``
    returns.

    Args:
        build_layers: takes ``config``, ``submodules`` (of the hybrid stack), ``symbols`` (the
            layers that Megatron's model read from its pattern), ``depth`` (from 1) and
            ``pg_collection``, and returns a module that is called as Megatron's stack is.
        mtp_layer_pattern, hybrid_submodules, others: what Megatron's block passes.
    """

    def __init__(
        self,
        *args: Any,
        build_layers: Callable[..., torch.nn.Module],
        mtp_layer_pattern: str | None = None,
        hybrid_submodules: Any = None,
        **others: Any,
    ):
        # Without a pattern Megatron's builds what the submodules name: here a placeholder.
        super().__init__(*args, **others)
        self.mtp_layer_pattern = mtp_layer_pattern  # its forward pass and its keys follow from it
        self.mtp_model_layer = build_layers(
            config=self.config,
            submodules=hybrid_submodules,
            symbols=mtp_layer_pattern,
            depth=self.layer_number,
            pg_collection=others["pg_collection"],
        )


def prediction_spec(
    norm: Any, projection: Any, build_layers: Callable[..., torch.nn.Module]
) -> ModuleSpec | None:
    """Return the ``mtp_block_spec`` of a hybrid stack; None where no model would read it.

    Args:
        norm: class of the norms.
        projection: class of the column-parallel projection.
        build_layers: see :class:`PredictionLayer`.
    """
    if not HAS_PREDICTION:
        return None
    submodules: Any = megatron.MultiTokenPredictionLayerSubmodules
    depth = ModuleSpec(
        module=PredictionLayer,
        params={"build_layers": build_layers},
        submodules=submodules(
            enorm=norm,
            hnorm=norm,
            layer_norm=norm,
            eh_proj=projection,
            mtp_model_layer=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=megatron.MultiTokenPredictionBlock,
        submodules=megatron.MultiTokenPredictionBlockSubmodules(layer_specs=[depth]),
    )


class DepthShare(NamedTuple):
    """What a context-parallel rank has of a prediction depth's loss of a microbatch.

    Attributes:
        loss_mask: ``[b, s/cp]``, of the depth's tokens.
        tokens: the unmasked ones of all ranks, at least 1.
        weight: what Megatron's token losses must be multiplied with; None without CP.
    """

    loss_mask: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor | None


def depth_shares(
    loss_mask: torch.Tensor,
    depths: int,
    cp_group: ProcessGroup,
    packed: PackedSeqParams | None,
    per_token: bool,
) -> list[DepthShare]:
    """Return a rank's share of the losses of all depths.

    Megatron divides token losses by the unmasked tokens of one context-parallel rank. Each depth
    masks the last token of a row, which one rank holds, so the ranks' numbers differ and the mean
    of their means is another mean than that of one rank (issue 7452 of Megatron-LM). With the
    weights it is the mean over the microbatch.

    Args:
        loss_mask: ``[b, s/cp]``.
        depths: how many there are.
        cp_group: the ranks of a microbatch.
        packed: the documents of the row.
        per_token: whether the model has ``calculate_per_token_loss``; Megatron then multiplies by
            the unmasked tokens of the main loss, again of one rank.
    """
    ranks = cp_group.size()
    roll = partial(
        megatron.roll_tensor, shifts=-1, dims=-1, cp_group=cp_group, packed_seq_params=packed
    )
    found, rolled = [], loss_mask
    for _ in range(depths):
        rolled, _ = roll(rolled)
        here = torch.stack([rolled.sum(), loss_mask.sum()]).double()
        everywhere = here.clone()
        if ranks > 1:
            torch.distributed.all_reduce(everywhere, group=cp_group)
        (mine, of_loss), (all_mine, all_of_loss) = here, everywhere.clamp(min=1)
        if ranks == 1:
            weight = None
        elif per_token:
            # A rank without unmasked tokens has only zeros to weigh.
            weight = mine / of_loss.clamp(min=1) * all_of_loss / all_mine
        else:
            weight = ranks * mine / all_mine
        found.append(DepthShare(rolled, all_mine, weight))
    return found
