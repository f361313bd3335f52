"""Record the tensors inside a model, aligned to their global shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.mixers.sequence_layout import token_order
from nemo_megacpp.proof.gather import GlobalValues, Piece, gather_pieces, to_numpy
from nemo_megacpp.proof.points import Alignment, Point, tap
from nemo_megacpp.proof.step_spec import StepSpec


@dataclass
class Trace:
    """What the watched points computed in one step, ``[s, rows, c]`` by the point's name.

    Gradients are those of the mean objective of the global batch.
    """

    points: dict[str, Point] = field(default_factory=dict)
    outputs: GlobalValues = field(default_factory=GlobalValues)
    gradients: GlobalValues = field(default_factory=GlobalValues)


class Recorder:
    """Records every watched tensor of this rank's chunks, and its gradient.

    Args:
        chunks: this rank's model chunks, unwrapped.
        config: of the model.
        spec: of the step; a single one.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        config: HybridConfig,
        spec: StepSpec,
    ):
        self._config, self._spec = config, spec
        self._rows, self._all_rows = spec.micro_batch_size, spec.global_batch_size
        self._points: dict[str, Point] = {}
        self._seen: dict[str, int] = {}
        self._outputs: list[Piece] = []
        self._gradients: list[Piece] = []
        self._dp = parallel_state.get_data_parallel_world_size()
        self._cp = parallel_state.get_context_parallel_world_size()
        tap(chunks, config, self._visit)

    def _visit(self, point: Point, tensor: torch.Tensor) -> None:
        microbatch = self._seen.get(point.name, 0)
        self._seen[point.name] = microbatch + 1
        self._points[point.name] = point
        self._outputs.append(self._piece(point, microbatch, tensor, partial=False))

        def keep(gradient: torch.Tensor) -> None:
            # Without calculate_per_token_loss, gradients are averaged over dp·cp ranks later.
            ranks = 1 if self._config.calculate_per_token_loss else self._dp * self._cp
            mean = gradient / ranks
            partial = point.alignment.partial_gradient
            self._gradients.append(self._piece(point, microbatch, mean, partial))

        if tensor.requires_grad:
            tensor.register_hook(keep)

    def _piece(self, point: Point, microbatch: int, tensor: torch.Tensor, partial: bool) -> Piece:
        tensor = tensor.reshape(-1, self._rows, tensor.size(-1))
        first = (microbatch * self._dp + parallel_state.get_data_parallel_rank()) * self._rows
        channels, width = _channels(point.alignment, tensor.size(-1))
        place = np.ix_(
            self._positions(point.alignment, first).numpy(),
            np.arange(first, first + self._rows),
            channels,
        )
        shape = (self._config.seq_length, self._all_rows, width)
        return Piece(point.name, shape, place, to_numpy(tensor), partial)

    def _positions(self, alignment: Alignment, row: int) -> torch.Tensor:
        rank = parallel_state.get_context_parallel_rank()
        packed = None
        if documents := self._spec.documents_of(row):
            bounds = torch.tensor([0, *accumulate(documents)], dtype=torch.int32)
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        held = token_order(self._config.seq_length, self._cp, packed).of_rank(rank)
        if not (alignment.scattered and self._config.sequence_parallel):
            return held
        tp = parallel_state.get_tensor_model_parallel_world_size()
        return held.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]

    def gather(self) -> Trace | None:
        """Return the trace on rank 0, None elsewhere; every rank must call."""
        world, first = torch.distributed.get_world_size(), torch.distributed.get_rank() == 0
        everyone: list[dict[str, Point]] | None = [{}] * world if first else None
        torch.distributed.gather_object(self._points, everyone)
        outputs, gradients = gather_pieces(self._outputs), gather_pieces(self._gradients)
        if everyone is None or outputs is None or gradients is None:
            return None
        points = sorted(
            (point for points in everyone for point in points.values()), key=lambda p: p.order
        )
        return Trace({point.name: point for point in points}, outputs, gradients)


def _channels(alignment: Alignment, held: int) -> tuple[np.ndarray, int]:
    """Return which channels of the whole this rank's ``held`` are, and how many there are."""
    if not alignment.split:
        return np.arange(held), held
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    whole = np.split(np.arange(sum(alignment.split)), np.cumsum(alignment.split)[:-1])
    return np.concatenate([np.split(part, tp)[rank] for part in whole]), sum(alignment.split)
