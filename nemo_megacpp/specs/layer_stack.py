"""Layers in a row: what a pipeline chunk and a depth of multi-token prediction share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default

from nemo_megacpp.core.layers import layer_number_arguments, mamba_layer_arguments
from nemo_megacpp.families import added
from nemo_megacpp.formulas.recompute import recompute_units
from nemo_megacpp.mixers.depth_state import DepthStateLayer
from nemo_megacpp.mixers.parameter_gather import wait_for_parameters
from nemo_megacpp.mixers.recompute import recompute
from nemo_megacpp.mixers.side_channels import Modules
from nemo_megacpp.pattern import Family
from nemo_megacpp.specs.packs import check_packs
from nemo_megacpp.specs.payload import DEPTH_STATE


@dataclass
class HybridStackSubmodules:
    """One layer spec for each family, by letter, the final norm, and the block of multi-token
    prediction, where Megatron's model builds one."""

    layers: dict[str, ModuleSpec] = field(default_factory=dict)
    final_norm: ModuleSpec | type = IdentityOp
    mtp_block_spec: ModuleSpec | None = None


class LayerStack(MegatronModule):
    """Layers of given families, in order.

    Args:
        config: the model configuration.
        submodules: layer specs by family.
        families: of the layers.
        layer_range: their global numbers, from 0.
        pg_collection: process groups.
        vp_stage: virtual stage of the chunk, None without virtual stages.
        residual_in_fp32: see :func:`nemo_megacpp.core.layers.mamba_layer_arguments`.
        depth: the prediction depth, from 1, whose layers these are; None: layers of the decoder.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        families: Sequence[Family],
        layer_range: range,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        residual_in_fp32: bool = False,
        depth: int | None = None,
    ):
        super().__init__(config=config)
        self.vp_stage = vp_stage
        self.pp_group, self.tp_group = pg_collection.pp, pg_collection.tp
        self.cp_group = pg_collection.cp
        self.layer_range, self.families = layer_range, tuple(families)
        self._added_families = {block.family for block in added()}
        self._extras: tuple[str, ...] = ()
        self._last_use: dict[str, int] = {}
        self.layers = torch.nn.ModuleList()
        for index, family in zip(self.layer_range, self.families, strict=True):
            with get_fp8_context(config, index, is_init=True):
                self.layers.append(
                    self._build_layer(
                        submodules, family, index + 1, residual_in_fp32, pg_collection, depth
                    )
                )
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.side_channels = Modules({})

    def _build_layer(
        self,
        submodules: HybridStackSubmodules,
        family: Family,
        layer_number: int,
        residual_in_fp32: bool,
        pg_collection: ProcessGroupCollection,
        depth: int | None,
    ) -> torch.nn.Module:
        spec = submodules.layers[family.value]
        module = spec.module if isinstance(spec, ModuleSpec) else spec
        if isinstance(module, type) and issubclass(module, MambaLayer):
            return build_module(
                spec,
                config=self.config,
                layer_number=layer_number,
                pp_layer_offset=self.layer_range.start,
                pg_collection=pg_collection,
                **mamba_layer_arguments(residual_in_fp32),
            )
        return build_module(
            spec,
            config=self.config,
            pg_collection=pg_collection,
            vp_stage=self.vp_stage,
            **layer_number_arguments(
                self.config, layer_number, self.vp_stage, self.pp_group.rank(), depth
            ),
        )

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        side_channel_ids: Mapping[str, torch.Tensor],
        extras: Mapping[str, torch.Tensor],
        inference_context: Any = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run all layers on ``[s, b, h]`` (the rank's share of ``s`` under SP and CP).

        Args:
            hidden_states, attention_mask, rotary_pos_emb, padding_mask: as Megatron's stack.
            packed_seq_params: the documents of the row.
            side_channel_ids: ids ``[b, s]`` by name.
            extras: what came beside the hidden states, by name.
            inference_context: as Megatron's stack.

        Returns:
            The hidden states, and what goes on beside them.

        Raises:
            UserError: packed rows that the layers cannot run (:mod:`nemo_megacpp.specs.packs`).
        """
        if packed_seq_params is not None:
            rotary_length = None if rotary_pos_emb is None else rotary_pos_emb.size(0)
            cp = self.cp_group.size()
            check_packs(
                packed_seq_params, hidden_states, rotary_length, self.layers, self.config, cp
            )
        # Delayed scaling reduces its statistics where a context ends: one around all layers. Other
        # recipes have one per layer, so that first_last_layers_bf16 can leave layers out.
        delayed = bool(self.config.fp8) and self.config.fp8_recipe == Fp8Recipe.delayed
        # Bound here: a recomputed layer reads its ids again in the backward pass.
        ids = side_channel_ids
        run = partial(self._run_layers, ids, inference_context, packed_seq_params, delayed)
        others = (attention_mask, rotary_pos_emb, padding_mask)
        beside = [extras.get(name) for name in self._extras]
        with get_fp8_context(self.config) if delayed else nullcontext():
            done = 0
            for unit in recompute_units(self.config, len(self.layers)) if self.training else ():
                assert not self.config.fp8, "Transformer Engine has a checkpoint of its own"
                region = partial(run, unit)
                hidden_states, *beside = recompute(region, hidden_states, *others, *beside)
                done = unit.stop
            rest = range(done, len(self.layers))
            hidden_states, *beside = run(rest, hidden_states, *others, *beside)
        produced = zip(self._extras, beside, strict=True)
        return hidden_states, {name: tensor for name, tensor in produced if tensor is not None}

    def _run_layers(
        self,
        side_channel_ids: Mapping[str, torch.Tensor],
        inference_context: Any,
        packed_seq_params: PackedSeqParams | None,
        fp8_is_on: bool,
        layers: range,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        *beside: torch.Tensor | None,
    ) -> tuple[torch.Tensor, *tuple[torch.Tensor | None, ...]]:
        """Run some of the layers; ``fp8_is_on``: inside a context around all of them.

        Returns:
            The hidden states, and what goes on beside them: as ``beside``, in declared order.
        """
        extras = dict(zip(self._extras, beside, strict=True))
        for local in layers:
            layer = self.layers[local]
            if self.families[local] in self._added_families:
                # They may read parameters of modules that they do not call.
                wait_for_parameters(*layer.modules())
            index = self.layer_range[local]
            if str(index) in self.side_channels:
                hidden_states = self.side_channels[str(index)](hidden_states, side_channel_ids)
            with nullcontext() if fp8_is_on else get_fp8_context(self.config, index):
                if isinstance(layer, TransformerLayer):
                    hidden_states, _ = layer(
                        hidden_states=hidden_states,
                        attention_mask=attention_mask,
                        inference_context=inference_context,
                        rotary_pos_emb=rotary_pos_emb,
                        packed_seq_params=packed_seq_params,
                        padding_mask=padding_mask,
                    )
                elif isinstance(layer, DepthStateLayer):
                    hidden_states, extras[DEPTH_STATE] = layer(
                        hidden_states,
                        extras.get(DEPTH_STATE),
                        hands_on=index < self._last_use.get(DEPTH_STATE, 0),
                        inference_context=inference_context,
                        packed_seq_params=packed_seq_params,
                    )
                else:
                    hidden_states = layer(
                        hidden_states=hidden_states,
                        attention_mask=attention_mask,
                        inference_context=inference_context,
                        packed_seq_params=packed_seq_params,
                    )
        return hidden_states, *(extras[name] for name in self._extras)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple | None = None, metadata: dict | None = None
    ) -> dict:
        """Key layers by their global index, so that a checkpoint does not know the stages."""
        sharded: dict[str, Any] = {}
        for local, layer in enumerate(self.layers):
            local_prefix = f"{prefix}layers.{local}."
            layer_dict = layer.sharded_state_dict(local_prefix, (), metadata)
            replace_prefix_for_sharding(
                layer_dict, local_prefix, f"{prefix}layers.{self.layer_range[local]}."
            )
            sharded.update(layer_dict)
        for name, module in self.named_children():
            if module is not self.layers:
                sharded.update(
                    sharded_state_dict_default(
                        module,
                        f"{prefix}{name}.",
                        sharded_offsets or (),
                        metadata,
                        tp_group=self.tp_group,
                    )
                )
        return sharded
