"""What a proof's step trains on, and what it differentiates."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.utils import get_attr_wrapped_model
from torch.utils.data import Dataset

from nemo_megacpp.mixers.documents import pack_row
from nemo_megacpp.mixers.microbatch import run_microbatch
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.side_channels import read_side_channels

_EOD = 0
"""The token that ends a document; no other token of a packed row is 0."""


class Rows(Dataset):
    """Random rows with the keys of Megatron's ``GPTDataset``, or of ``PackedDocuments``, and random
    ids of the model's side channels.

    A row depends on its number only. Where the objective is a linear form of the logits, ``labels``
    number the tokens of all rows: the form reads its coefficients by them.

    Args:
        spec: how many rows, of which lengths, masks and documents.
    """

    def __init__(self, spec: StepSpec):
        self._spec = spec
        self._length: int = spec.model["seq_length"]
        self._vocab_size: int = spec.model["vocab_size"]
        self._channels = read_side_channels(spec.model.get("side_channels"))

    def __len__(self) -> int:
        return self._spec.global_batch_size * self._spec.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self._spec.seed + index)
        text = torch.randint(1, self._vocab_size, (self._length + 1,), generator=generator)
        if self._spec.documents:
            row = pack_row(self._with_ends(text, index), _EOD)
        else:
            row = {
                "tokens": text[:-1].contiguous(),
                "labels": text[1:].contiguous(),
                "loss_mask": torch.ones(self._length),
                "position_ids": torch.arange(self._length),
            }
        if self._spec.loss_mask == "uneven":
            row["loss_mask"] *= self._uneven_mask(index, generator)
        for channel in self._channels:
            ids = torch.randint(channel.vocab_size, (self._length,), generator=generator)
            row[channel.key] = ids
        if self._spec.objective == "logits":
            row["labels"] = index * self._length + torch.arange(self._length)
        return row

    def _with_ends(self, text: torch.Tensor, index: int) -> torch.Tensor:
        lengths = self._spec.documents_of(index)
        assert sum(lengths) == self._length, (lengths, self._length)
        text[torch.tensor(lengths).cumsum(0) - 1] = _EOD
        return text

    def _uneven_mask(self, index: int, generator: torch.Generator) -> torch.Tensor:
        """Mask the start of a row, ever more of it from row to row, and a few tokens more."""
        mask = (torch.rand(self._length, generator=generator) < 0.7).float()
        mask[: 1 + index % 4 * self._length // 5] = 0
        mask[-1] = 1
        return mask


def linear_form_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return ``Σ_v c·logits`` of every token, ``[b, s/cp]``, in place of its cross entropy.

    A ``forward_step`` for NeMo's model, with the arguments of
    :func:`nemo_megacpp.nemo.hybrid_gpt.hybrid_forward_step`. The coefficients depend on the
    number of the token (``batch["labels"]``, see :class:`Rows`) and on the index of the vocabulary,
    and on nothing else. The depths of multi-token prediction have the same form of their own
    logits, by the numbers of the tokens that they predict.
    """
    predicts = getattr(get_attr_wrapped_model(model, "config"), "mtp_num_layers", None)
    if predicts:
        core = get_attr_wrapped_model(model, "token_loss", return_model_obj=True)
        core.token_loss = lambda numbers, logits: linear_form(logits.transpose(0, 1), numbers)
    labels = batch["labels"] if predicts else None
    output = run_microbatch(model, {**batch, "labels": labels})
    if predicts or not get_attr_wrapped_model(model, "post_process"):
        return output  # that form already, or hidden states for the next pipeline stage
    return linear_form(output, batch["labels"])


def linear_form(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return ``[b, s]`` from this rank's logits ``[b, s, v/tp]`` and the tokens' numbers."""
    width = logits.size(-1)
    first = parallel_state.get_tensor_model_parallel_rank() * width
    vocabulary = torch.arange(first, first + width, device=logits.device, dtype=torch.float64)
    angles = 1.7 * numbers[..., None].double() + 0.61 * vocabulary * (1 + vocabulary)
    mine = (torch.sin(angles).to(logits) * logits).sum(-1)
    return reduce_from_tensor_model_parallel_region(mine)
