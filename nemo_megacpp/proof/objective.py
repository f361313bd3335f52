"""The number that a proof's step differentiates where Megatron's cross entropy is too coarse."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.utils import get_attr_wrapped_model


def device() -> torch.device:
    """Return this rank's GPU, or the CPU where there is none (:mod:`nemo_megacpp.runtime`)."""
    return torch.device(torch.cuda.current_device())


def linear_form_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return ``Σ_v c·logits`` of every token, ``[b, s/cp]``, in place of its cross entropy.

    A ``forward_step`` for NeMo's model, with the arguments of
    :func:`nemo_megacpp.nemo.hybrid_gpt.hybrid_forward_step`. The coefficients depend on the
    number of the token (``batch["labels"]``, see :class:`nemo_megacpp.proof.rows.Rows`) and on the
    index of the vocabulary, and on nothing else.
    """
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=None,
        packed_seq_params=batch.get("packed_seq_params"),
    )
    if not get_attr_wrapped_model(model, "post_process"):
        return output  # hidden states, for the next pipeline stage
    return linear_form(output, batch["labels"])


def linear_form(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return ``[b, s]`` from this rank's logits ``[b, s, v/tp]`` and the tokens' numbers."""
    width = logits.size(-1)
    first = parallel_state.get_tensor_model_parallel_rank() * width
    vocabulary = torch.arange(first, first + width, device=logits.device, dtype=torch.float64)
    angles = 1.7 * numbers[..., None].double() + 0.61 * vocabulary * (1 + vocabulary)
    mine = (torch.sin(angles).to(logits) * logits).sum(-1)
    return reduce_from_tensor_model_parallel_region(mine)
