"""The embeddings of side channels at one place of the stack: the embedding, or a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch.distributed import ProcessGroup as Group
from torch.nn import functional as F

from nemo_megacpp.side_channels import SideChannel


def _replicated(config: TransformerConfig, shape: tuple[int, int], init: Any) -> torch.nn.Parameter:
    """Return a parameter that every tensor-parallel rank has whole.

    With SP the ranks see different tokens: its gradient is partial, and the tag makes Megatron sum
    it over tp once per step. Without SP they see the same, and the gradient is complete.
    """
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    values = torch.empty(shape, dtype=config.params_dtype, device=device)
    parameter = torch.nn.Parameter(values)
    if config.perform_initialization:
        init(parameter)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class ReplicatedTable(MegatronModule):
    """A table ``[vocab_size, width]`` that every tensor-parallel rank has whole.

    Without SP it is *invariant* on tp, with SP *replicated*: a rank looks up its own tokens.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, width: int, tp_group: Group):
        super().__init__(config=config)
        self.tp_group = tp_group
        init = config.embedding_init_method or config.init_method
        self.weight = _replicated(config, (vocab_size, width), init)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed ``[b, s]``: ``[s, b, width]``, with SP of this rank's share of ``s``."""
        ids = ids.t()
        if self.config.sequence_parallel:
            ids = ids.chunk(self.tp_group.size())[self.tp_group.rank()]
        return F.embedding(ids, self.weight)


class VocabularyTable(VocabParallelEmbedding):
    """Megatron's embedding, whose rows are split over TP (*varying*), for ``[s, b, width]``."""

    def __init__(self, config: TransformerConfig, vocab_size: int, width: int, tp_group: Group):
        super().__init__(
            vocab_size,
            width,
            init_method=config.embedding_init_method or config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=tp_group,
        )

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Embed ``[b, s]``: ``[s, b, width]``, with SP of this rank's share of ``s``."""
        found = super().forward(input_)
        return found if self.reduce_scatter_embeddings else found.transpose(0, 1)


class Modules(torch.nn.ModuleDict):
    """Modules by name, each of which shards its state as it says itself; Megatron's default takes
    what is inside another container for replicated."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Shard each module under its name."""
        sharded: dict[str, Any] = {}
        for name, module in self.items():
            place = f"{prefix}{name}."
            sharded |= sharded_state_dict_default(module, place, sharded_offsets, metadata)
        return sharded


TABLES = {"replicated": ReplicatedTable, "vocabulary": VocabularyTable}


class SideChannelEmbeddings(MegatronModule):
    """Brings side channels into the stream at one place; :mod:`nemo_megacpp.side_channels` has the
    maths.

    Args:
        config: of the model.
        channels: those that this place owns, at least one.
        tp_group: the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, channels: Sequence[SideChannel], tp_group: Group):
        super().__init__(config=config)
        hidden: int = config.hidden_size
        self.channels, self.tp_group = tuple(channels), tp_group
        widths = {channel.name: channel.embedding_width(hidden) for channel in channels}
        self.tables = Modules(
            {
                channel.name: TABLES[channel.partition](
                    config, channel.vocab_size, widths[channel.name], tp_group
                )
                for channel in channels
            }
        )
        joined = sum(widths[c.name] for c in channels if c.combine == "concat")
        if joined:
            shape = (hidden, hidden + joined)
            self.projection = _replicated(config, shape, config.output_layer_init_method)

    def forward(self, x: torch.Tensor, ids: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the stream ``[s, b, h]`` with the channels in it.

        Args:
            x: the stream, with SP and CP this rank's share of ``s``.
            ids: ``[b, s]`` of each channel by name, with CP this rank's share of ``s``.
        """
        joined = [x]
        for channel in self.channels:
            found = self.tables[channel.name](ids[channel.name])
            if channel.combine == "concat":
                joined.append(found)
            else:
                x = x + found
        if len(joined) > 1:
            whole = torch.cat([part.to(self.projection.dtype) for part in joined], -1)
            x = x + F.linear(whole, self.projection)
        return x
