"""The model: Megatron's hybrid model around our stack."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.core.model import CoreModel, model_arguments, stage_argument
from nemo_megacpp.core.multi_token import DepthShare, depth_shares
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import padded_vocab_size
from nemo_megacpp.mixers.side_channels import SideChannelEmbeddings
from nemo_megacpp.side_channels import SideChannel, channels_at, read_side_channels
from nemo_megacpp.specs.stack_spec import build_hybrid_stack_spec

_WHILE_BUILDING = re.compile(r"( when instantiating \w+)+$")


class HybridModel(CoreModel):
    """Megatron's hybrid model with a virtual stage, which not every release has an argument for,
    with side channels, and with a loss of multi-token prediction that CP does not change.

    The stage decides, while the model is built, which chunk shares the embedding's weight. So it is
    set before anything else, and stays when ``LanguageModule`` sets it to None.

    Attributes:
        token_loss: takes labels ``[b, s]`` and logits ``[s, b, v/tp]`` and returns the losses
            ``[b, s]``, in the place of the cross entropy; None: the cross entropy.
        depth_losses: ``[depths]``, of the prediction depths, if the chunk has them: each the sum,
            over the microbatches trained on, of this rank's share of the mean over a microbatch's
            unmasked tokens. Read and cleared by
            :func:`nemo_megacpp.specs.depth_losses.reduced_depth_losses`.
    """

    def __init__(self, *args: Any, vp_stage: int | None = None, **kwargs: Any):
        self._virtual_stage = vp_stage
        self.token_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._depth_shares: Iterator[tuple[int, DepthShare]] = iter(())
        self.depth_losses: torch.Tensor | None = None
        super().__init__(*args, **kwargs, **stage_argument(vp_stage))
        self.side_channels = read_side_channels(self.config.side_channels)
        owned = channels_at(self.side_channels, None)
        if self.pre_process and owned:
            tp_group = self.pg_collection.tp
            # A part of the embedding, so that its keys in a checkpoint are too.
            self.embedding.side_channels = SideChannelEmbeddings(self.config, owned, tp_group)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        decoder_input: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *args: Any,
        loss_mask: torch.Tensor | None = None,
        side_channels: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run Megatron's forward pass, with side channels.

        Args:
            loss_mask: ``[b, s]``, with CP this rank's share of ``s``; read by multi-token
                prediction alone, whose losses are masked and averaged inside the model.
            side_channels: ids ``[b, s]`` of every channel by name, with CP this rank's share of
                ``s``. Every pipeline stage takes them; one that owns none reads none.
        """
        if kwargs.get("inference_context") is not None:
            # Here as well, as the embedding has assertions of its own.
            self.decoder.check_inference(
                kwargs["inference_context"], kwargs.get("packed_seq_params")
            )
        ids = _validate_ids(self.side_channels, side_channels or {})
        if self.pre_process and decoder_input is None and channels_at(self.side_channels, None):
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            decoder_input = self.embedding.side_channels(embedded, ids)
        if getattr(self, "mtp_process", False):
            kwargs["loss_mask"] = self._share_depths(labels, loss_mask, kwargs)
        self.decoder.side_channel_ids = ids  # Megatron's model has no argument for it
        try:
            return super().forward(
                input_ids, position_ids, attention_mask, decoder_input, labels, *args, **kwargs
            )
        finally:
            self.decoder.side_channel_ids = {}

    def _share_depths(
        self,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        others: Mapping[str, Any],
    ) -> torch.Tensor | None:
        """Prepare the losses of the prediction depths; return the mask that they are taken with."""
        if labels is None:
            if torch.is_grad_enabled():
                raise UserError(
                    "A model with multi-token prediction is trained with labels: the losses of its "
                    "depths are computed inside it."
                )
            return loss_mask
        loss_mask = torch.ones_like(labels) if loss_mask is None else loss_mask
        # Megatron divides its sums by each other, which in float32 would round a float64 model.
        wide = torch.promote_types(loss_mask.dtype, self.config.params_dtype)
        loss_mask = loss_mask.to(wide)
        shares = depth_shares(
            loss_mask,
            self.config.mtp_num_layers or 0,
            self.pg_collection.cp,
            others.get("packed_seq_params"),
            self.config.calculate_per_token_loss,
        )
        self._depth_shares = iter(enumerate(shares))
        return loss_mask

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the losses of the tokens, ``[b, s]``. Megatron's model calls it for each
        prediction depth, in order, and then for the main loss."""
        compute = self.token_loss or super().compute_language_model_loss
        losses = compute(labels, logits)
        if (following := next(self._depth_shares, None)) is None:
            return losses
        depth, share = following
        if self.training:
            self._add_depth_loss(depth, losses.detach(), share)
        return losses if share.weight is None else losses * share.weight.to(losses)

    def _add_depth_loss(self, depth: int, losses: torch.Tensor, share: DepthShare) -> None:
        if self.depth_losses is None:
            count = self.config.mtp_num_layers
            self.depth_losses = torch.zeros(count, dtype=torch.float64, device=losses.device)
        self.depth_losses[depth] += (losses * share.loss_mask).double().sum() / share.tokens

    @property
    def vp_stage(self) -> int | None:
        """Virtual pipeline stage of this chunk, None without virtual stages."""
        return self._virtual_stage

    @vp_stage.setter
    def vp_stage(self, value: int | None) -> None:
        assert value in (None, self._virtual_stage), (value, self._virtual_stage)


def _validate_ids(
    channels: tuple[SideChannel, ...], ids: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Refuse a batch whose channels are not those of the model.

    Raises:
        UserError: it lacks a channel, or has one that the model does not declare.
    """
    declared = [channel.name for channel in channels]
    if sorted(ids) != sorted(declared):
        raise UserError(
            f"The batch has the side channels {', '.join(sorted(ids)) or 'none'}, and the model "
            f"declares {', '.join(sorted(declared)) or 'none'}."
        )
    return ids


def build_hybrid_model(
    config: HybridConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    backend: BackendSpecProvider | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> HybridModel:
    """Build this rank's chunk of the model that ``config`` describes.

    Process groups must be initialised (``parallel_state``), or given.

    Args:
        config: the model.
        pre_process: whether the chunk owns the embedding.
        post_process: whether it owns the final norm, head and loss.
        vp_stage: virtual pipeline stage of the chunk.
        backend: where modules come from; this installation's default if not given.
        pg_collection: process groups; Megatron's global ones if not given.

    Raises:
        UserError: settings that one of the modules refuses, Megatron's own included.
    """
    with _refusals_as_user_errors():
        return HybridModel(
            config,
            **model_arguments(
                build_hybrid_stack_spec(config, backend, vp_stage, str(config.pattern)),
                config.pattern,
                config.pipeline_model_parallel_size
                * (config.virtual_pipeline_model_parallel_size or 1),
            ),
            vocab_size=padded_vocab_size(
                config.vocab_size,
                config.make_vocab_size_divisible_by,
                config.tensor_model_parallel_size,
            ),
            max_sequence_length=config.seq_length,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )


@contextlib.contextmanager
def _refusals_as_user_errors() -> Iterator[None]:
    """Raise as UserError what a module refuses, by Megatron's assertions too, without the list of
    modules that Megatron's builder adds to the message."""
    try:
        yield
    except (UserError, AssertionError) as error:
        message = _WHILE_BUILDING.sub("", str(error))
        if isinstance(error, UserError):
            raise UserError(message) from error
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("megatron."):
            raise
        raise UserError(f"Megatron refuses this model: {message.rstrip(' ,.')}.") from error


def build_hybrid_chunks(
    config: HybridConfig, backend: BackendSpecProvider | None = None
) -> list[torch.nn.Module]:
    """Build all pipeline chunks of this rank, one per virtual stage, over Megatron's global groups.

    Args:
        config: the model.
        backend: where modules come from; this installation's default if not given.
    """
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    stages = config.virtual_pipeline_model_parallel_size or 1
    return [
        build_hybrid_model(
            config,
            pre_process=first and stage == 0,
            post_process=last and stage == stages - 1,
            vp_stage=None if config.virtual_pipeline_model_parallel_size is None else stage,
            backend=backend,
        )
        for stage in range(stages)
    ]
