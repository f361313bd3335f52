"""The stack: the layers of one pipeline chunk of a hybrid model.

Megatron's ``MambaStack`` has fixed symbols, a hard-coded Transformer Engine norm, no virtual
stages, and ``num_layers // pp`` layers per stage: 52 layers at PP=8 silently become 48. This stack
takes a pattern with explicit cuts, and builds every layer or raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import WrappedTensor, make_viewless_tensor

from nemo_megacpp.config import HybridConfig, config_violations
from nemo_megacpp.core.model import check_symbols, chunk_at, only_stage
from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.mixers.head_parallel import log_once
from nemo_megacpp.mixers.side_channels import Modules, SideChannelEmbeddings
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.settings.script import validate_script
from nemo_megacpp.side_channels import channels_at, read_side_channels
from nemo_megacpp.specs.inference import check_context, check_inference
from nemo_megacpp.specs.layer_stack import HybridStackSubmodules, LayerStack
from nemo_megacpp.specs.payload import declared, payload_at, sends_shapes


class HybridStack(LayerStack):
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
        name: str | None = None,
    ):
        assert pg_collection is not None, "pg_collection must be provided for HybridStack"
        stages = pg_collection.pp.size()
        written = pattern or hybrid_override_pattern
        if written is None and layer_type_list is not None:
            written = only_stage(layer_type_list, stages)
        layers = HybridPattern.parse(written or "", depth=config.num_layers)
        channels = read_side_channels(getattr(config, "side_channels", None))
        chunks = layers.chunks(stages * (config.virtual_pipeline_model_parallel_size or 1))
        ours = (vp_stage or 0) * stages + pg_collection.pp.rank()
        here = chunk_at(chunks, layer_type_list, pp_layer_offset, ours)
        if layer_type_list is not None:
            check_symbols(layers, here, layer_type_list)
            if config.virtual_pipeline_model_parallel_size is not None:
                # A script builds all virtual stages with one spec, which knows none.
                vp_stage = chunks.index(here) // stages
        if not isinstance(config, HybridConfig):
            _validate_plain(config, layers, hybrid_fields, vp_stage)
        super().__init__(
            config,
            submodules,
            layers.families[here.start : here.stop],
            here,
            pg_collection,
            vp_stage,
            residual_in_fp32,
        )
        self.pre_process, self.post_process = pre_process, post_process
        self._model_families = layers.families
        self._channels = channels
        self.input_tensor: torch.Tensor | None = None  # set by the pipeline schedules
        self._beside_input: dict[str, torch.Tensor] = {}
        self._declare_payload(layers.letters, hybrid_fields)
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
            packed_seq_params = inference_context.packed_seq_params()
        # With SP, ranks of a tensor-parallel group hold different tokens: different dropout masks.
        tracker = get_cuda_rng_tracker()
        with tracker.fork() if self.config.sequence_parallel else nullcontext():
            hidden_states, extras = self.run_layers(
                hidden_states,
                attention_mask,
                rotary_pos_emb,
                padding_mask,
                packed_seq_params,
                self.side_channel_ids,
                extras,
                inference_context,
            )
        if not self.post_process:
            hidden_states = self._sent.pack(hidden_states, extras)
        elif isinstance(inference_context, SlotContext):
            hidden_states = inference_context.with_logits(hidden_states)
        if hasattr(self, "final_norm"):
            hidden_states = self.final_norm(hidden_states)
        # The pipeline frees what it sent by its storage, which a view would keep alive.
        return make_viewless_tensor(
            inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True
        )

    def received_shape(self, tokens: int, batch: int) -> tuple[int, int, int]:
        """Return the shape of what the previous stage sends of ``batch`` rows of ``tokens``."""
        return self._received.shape(tokens, batch)

    @property
    def packs_prompts(self) -> bool:
        """Whether prompts of several sequences may go through the model in one row."""
        return not self._added_families.intersection(self._model_families)

    def check_inference(self, context: Any, packed: PackedSeqParams | None) -> None:
        """Refuse what has no inference; see :mod:`nemo_megacpp.specs.inference`."""
        check_context(context, self.training, packed is not None)
        check_inference(
            self.config,
            self._model_families,
            cp=self.cp_group.size(),
            side_channels=bool(self._channels),
        )
        prompts = isinstance(context, SlotContext) and context.pack is not None
        if prompts and not self.packs_prompts:
            raise UserError(
                "The model has families of its user's, whose layers are not known to tell the "
                "prompts of a packed row apart. Give each prompt a pass of its own."
            )
        if self._extras and self.pp_group.size() > 1 and not isinstance(context, SlotContext):
            raise UserError(
                f"{', '.join(self._extras)} crosses the cuts of pipeline stages beside the hidden "
                f"states, and Megatron's inference receives the hidden states alone. Generate with "
                f"nemo-megacpp generate (nemo_megacpp.inference.slot_batch), or load the checkpoint"
                f" with pp=1."
            )


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
