"""The stack: the layers of one pipeline chunk of a hybrid model.

Megatron's ``MambaStack`` has fixed symbols, a hard-coded Transformer Engine norm, no virtual
stages, and ``num_layers // pp`` layers per stage: 52 layers at PP=8 silently become 48. This stack
takes a pattern with explicit cuts, and builds every layer or raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import WrappedTensor, make_viewless_tensor

from nemo_megacpp.config import HybridConfig, config_violations
from nemo_megacpp.core.layers import layer_number_arguments, mamba_layer_arguments
from nemo_megacpp.core.model import check_symbols, chunk_at, only_stage
from nemo_megacpp.core.releases import require_supported
from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.families import added, registered
from nemo_megacpp.formulas.recompute import recompute_units
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.mixers.depth_state import DepthStateLayer
from nemo_megacpp.mixers.head_parallel import log_once
from nemo_megacpp.mixers.parameter_gather import wait_for_parameters
from nemo_megacpp.mixers.recompute import recompute
from nemo_megacpp.mixers.side_channels import Modules, SideChannelEmbeddings
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.settings.script import validate_script
from nemo_megacpp.side_channels import channels_at, read_side_channels
from nemo_megacpp.specs.backend import default_backend
from nemo_megacpp.specs.inference import check_context, check_inference
from nemo_megacpp.specs.packs import check_packs
from nemo_megacpp.specs.payload import DEPTH_STATE, declared, payload_at, sends_shapes


@dataclass
class HybridStackSubmodules:
    """One layer spec for each family, by letter, and the final norm."""

    layers: dict[str, ModuleSpec] = field(default_factory=dict)
    final_norm: ModuleSpec | type = IdentityOp


class HybridStack(MegatronModule):
    """The layers of this rank's pipeline chunk, and on the last one the final norm.

    Takes the place of Megatron's stack in its hybrid model, and has the constructors of all
    releases: until 0.17 the model passes the pattern, from 0.18 on the symbols and the offset of
    the layers that it selected.

    Args:
        config: the model configuration; ``num_layers`` is the depth of the whole model.
        submodules: layer specs by family.
        hybrid_override_pattern: the pattern, in letters or in Megatron's symbols.
        pre_process: whether this chunk owns the embedding.
        post_process: whether it owns the head.
        vp_stage: virtual stage of this chunk, None without virtual stages.
        pattern: the pattern that the spec carries; it goes before the model's.
        layer_type_list: the symbols of this chunk's layers, where the model selects them. Without
            any pattern they are the layers.
        pp_layer_offset: number of the first of them.
        is_mtp_layer: refused: no multi-token prediction.
        name: not used.
        hybrid_fields: with a plain ``TransformerConfig``, which Megatron's own scripts build, the
            fields that the specs were made of; their defaults if not given.

    Raises:
        UserError: PP x virtual stages do not divide the pattern's layers, or a plain configuration
            is one that :class:`HybridConfig` would refuse.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        residual_in_fp32: bool = False,
        pre_process: bool = True,
        hybrid_attention_ratio: float = 0.0,
        hybrid_mlp_ratio: float = 0.0,
        hybrid_override_pattern: str | None = None,
        post_layer_norm: bool = True,
        post_process: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        hybrid_fields: HybridFields | None = None,
        pattern: str | None = None,
        layer_type_list: list[str] | None = None,
        pp_layer_offset: int = 0,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.vp_stage = vp_stage
        assert pg_collection is not None, "pg_collection must be provided for HybridStack"
        self.pre_process, self.post_process = pre_process, post_process
        self.pp_group, self.tp_group = pg_collection.pp, pg_collection.tp
        self.cp_group = pg_collection.cp
        self.input_tensor: torch.Tensor | None = None  # set by the pipeline schedules
        self._beside_input: dict[str, torch.Tensor] = {}

        if is_mtp_layer:
            raise UserError("The hybrid stack has no multi-token prediction (mtp_num_layers).")
        written = pattern or hybrid_override_pattern
        if written is None and layer_type_list is not None:
            written = only_stage(layer_type_list, self.pp_group.size())
        layers = HybridPattern.parse(written or "", depth=config.num_layers)
        channels = read_side_channels(getattr(config, "side_channels", None))
        self._channels = channels
        stages = self.pp_group.size()
        chunks = layers.chunks(stages * (config.virtual_pipeline_model_parallel_size or 1))
        ours = (vp_stage or 0) * stages + self.pp_group.rank()
        self.layer_range = chunk_at(chunks, layer_type_list, pp_layer_offset, ours)
        if layer_type_list is not None:
            check_symbols(layers, self.layer_range, layer_type_list)
            if config.virtual_pipeline_model_parallel_size is not None:
                # A script builds all virtual stages with one spec, which knows none.
                self.vp_stage = chunks.index(self.layer_range) // stages
        if not isinstance(config, HybridConfig):
            _validate_plain(config, layers, hybrid_fields, self.vp_stage)
        self._declare_payload(layers.letters, hybrid_fields)
        self.families = tuple(layers.families[i] for i in self.layer_range)
        self._added_families = {block.family for block in added()}
        self.layers = torch.nn.ModuleList()
        for index, family in zip(self.layer_range, self.families, strict=True):
            with get_fp8_context(config, index, is_init=True):
                self.layers.append(
                    self._build_layer(
                        submodules, family, index + 1, residual_in_fp32, pg_collection
                    )
                )
        self.num_layers_per_pipeline_rank = len(self.layers)
        # By the layer's number in the whole model, so that a checkpoint does not know the stages.
        self.side_channels = Modules(
            {
                str(index): SideChannelEmbeddings(config, owned, self.tp_group)
                for index in self.layer_range
                if (owned := channels_at(channels, index))
            }
        )
        self.side_channel_ids: Mapping[str, torch.Tensor] = {}  # set by the model
        if post_process and post_layer_norm:
            self.final_norm = build_module(
                submodules.final_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )

    def _declare_payload(self, letters: str, hybrid_fields: HybridFields | None) -> None:
        """Fix what this chunk receives and sends, and let the schedules know that it may be wider
        than the hidden states (:mod:`nemo_megacpp.specs.payload` says how)."""
        config: Any = self.config
        fields = config if isinstance(config, HybridConfig) else hybrid_fields or HybridFields()
        everything, here = declared(letters, fields), self.layer_range
        self._extras = tuple(each.item.name for each in everything)
        self._last_use = {each.item.name: each.last for each in everything}
        self._received = payload_at(here.start, letters, fields, config)
        self._sent = payload_at(here.stop, letters, fields, config)
        names = ", ".join(self._extras)
        if self._sent.room is not None:
            if not isinstance(config, HybridConfig):
                raise UserError(
                    f"{names} crosses the cuts of virtual pipeline stages, whose schedule must be "
                    f"told the rows of a message; Megatron's own scripts do not tell it. Train "
                    f"without virtual stages, or with nemo-megacpp train."
                )
            log_once(f"Pipeline stages send {names} in rows behind the hidden states.")
        elif sends_shapes(letters, fields, config) and not config.variable_seq_lengths:
            config.variable_seq_lengths = True  # read by the schedules
            log_once(f"Pipeline stages send shapes before tensors, which carry {names} as well.")

    def _build_layer(
        self,
        submodules: HybridStackSubmodules,
        family: Family,
        layer_number: int,
        residual_in_fp32: bool,
        pg_collection: ProcessGroupCollection,
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
                self.config, layer_number, self.vp_stage, self.pp_group.rank()
            ),
        )

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Set what came from the previous pipeline stage.

        It is unpacked here: ``MambaModel`` reads the tokens of the hidden states from
        ``input_tensor`` before it calls the stack.
        """
        self._beside_input = {}
        if input_tensor is not None and not self.pre_process:
            input_tensor, self._beside_input = self._received.unpack(input_tensor)
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: torch.Tensor | WrappedTensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: torch.Tensor | None = None,
        *,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the chunk on ``[s, b, h]`` (the rank's share of ``s`` under SP and CP).

        Args:
            inference_context: holds the states of the rows' sequences, which the layers read
                before the tokens and write after them.

        Raises:
            UserError: packed rows that the stack cannot run (:mod:`nemo_megacpp.specs.packs`), or
                what has no inference (:mod:`nemo_megacpp.specs.inference`).
        """
        assert inference_params is None, "inference_params is Megatron's old name for the context"
        if inference_context is not None:
            self.check_inference(inference_context, packed_seq_params)
        extras = self._beside_input
        if not self.pre_process:
            assert self.input_tensor is not None
            hidden_states = self.input_tensor
        if isinstance(hidden_states, WrappedTensor):
            hidden_states = hidden_states.unwrap()
        if isinstance(inference_context, SlotContext):
            attention_mask = inference_context.attention_mask(hidden_states.device)
        if packed_seq_params is not None:
            rotary_length = None if rotary_pos_emb is None else rotary_pos_emb.size(0)
            cp = self.cp_group.size()
            check_packs(
                packed_seq_params, hidden_states, rotary_length, self.layers, self.config, cp
            )
        # Delayed scaling reduces its statistics where a context ends: one around all layers. Other
        # recipes have one per layer, so that first_last_layers_bf16 can leave layers out.
        delayed = bool(self.config.fp8) and self.config.fp8_recipe == Fp8Recipe.delayed
        # With SP, ranks of a tensor-parallel group hold different tokens: different dropout masks.
        tracker = get_cuda_rng_tracker()
        rng = tracker.fork() if self.config.sequence_parallel else nullcontext()
        # Bound here: a recomputed layer reads its ids again in the backward pass.
        ids = self.side_channel_ids
        run = partial(self._run_layers, ids, inference_context, packed_seq_params, delayed)
        others = (attention_mask, rotary_pos_emb, padding_mask)
        beside = [extras.get(name) for name in self._extras]
        with rng, get_fp8_context(self.config) if delayed else nullcontext():
            done = 0
            for unit in recompute_units(self.config, len(self.layers)) if self.training else ():
                assert not self.config.fp8, "Transformer Engine has a checkpoint of its own"
                region = partial(run, unit)
                hidden_states, *beside = recompute(region, hidden_states, *others, *beside)
                done = unit.stop
            rest = range(done, len(self.layers))
            hidden_states, *beside = run(rest, hidden_states, *others, *beside)
        if not self.post_process:
            produced = zip(self._extras, beside, strict=True)
            extras = {name: tensor for name, tensor in produced if tensor is not None}
            hidden_states = self._sent.pack(hidden_states, extras)
        if hasattr(self, "final_norm"):
            hidden_states = self.final_norm(hidden_states)
        # The pipeline frees what it sent by its storage, which a view would keep alive.
        return make_viewless_tensor(
            inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True
        )

    def check_inference(self, context: Any, packed: PackedSeqParams | None) -> None:
        """Refuse what has no inference; see :mod:`nemo_megacpp.specs.inference`."""
        check_context(context, self.training, packed is not None)
        owners = (None, *self.layer_range)
        check_inference(
            self.config,
            self.families,
            cp=self.cp_group.size(),
            pp=self.pp_group.size(),
            side_channels=any(channels_at(self._channels, owner) for owner in owners),
        )

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
        """Run some layers of the chunk; ``fp8_is_on``: inside a context around all of them.

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


def _validate_plain(
    config: TransformerConfig,
    pattern: HybridPattern,
    hybrid_fields: HybridFields | None,
    vp_stage: int | None,
) -> None:
    """Validate a plain configuration as a :class:`HybridConfig` validates itself."""
    raise_violations(config_violations(config, pattern, hybrid_fields))
    validate_script(config)
    chunks = config.virtual_pipeline_model_parallel_size
    if chunks is not None and vp_stage is None:
        raise UserError(
            f"{chunks} virtual pipeline stages: pretrain_mamba.py of Megatron-LM 0.16 does not "
            f"pass the stage to the model. Train without them, or with nemo-megacpp train."
        )


def build_hybrid_stack_spec(
    fields: HybridFields,
    backend: BackendSpecProvider | None = None,
    vp_stage: int | None = None,
    pattern: str | None = None,
) -> ModuleSpec:
    """Return the spec of a stack.

    Args:
        fields: the model's hybrid fields (a :class:`HybridConfig` has them): the mode of M blocks
            and the settings of the mixers.
        backend: where the modules come from; this installation's default if not given.
        vp_stage: virtual pipeline stage of the chunk to be built.
        pattern: of the whole model; without one it is the model's, which from 0.18 on takes
            Megatron's own letters only.

    Raises:
        UserError: a mixer's setting is illegal, or the installed Megatron-Core is not supported.
    """
    require_supported()
    backend = backend or default_backend()
    return ModuleSpec(
        module=HybridStack,
        params={"vp_stage": vp_stage, "hybrid_fields": fields, "pattern": pattern},
        submodules=HybridStackSubmodules(
            layers={block.letter: block.layer_spec(backend, fields) for block in registered()},
            final_norm=backend.layer_norm(rms_norm=True),
        ),
    )
