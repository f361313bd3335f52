"""The batch of a proof's step, dealt to a rank, and the number that the step differentiates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import padded_vocab_size
from nemo_megacpp.mixers.sequence_layout import deal_batch
from nemo_megacpp.proof.step_spec import StepSpec


def device() -> torch.device:
    """Return this rank's GPU, or the CPU where there is none (:mod:`nemo_megacpp.runtime`)."""
    return torch.device(torch.cuda.current_device())


def microbatches(spec: StepSpec, config: HybridConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this data-parallel rank's microbatches, sliced for its context-parallel rank."""
    generator = torch.Generator().manual_seed(spec.seed)
    rows = torch.randint(
        config.vocab_size, (spec.global_batch_size, config.seq_length + 1), generator=generator
    )
    dp = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    step = spec.micro_batch_size
    for start in range(rank * step, spec.global_batch_size, dp * step):
        part = rows[start : start + step]
        batch = {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "row": torch.arange(start, start + step)[:, None].expand(-1, config.seq_length),
            "position_ids": torch.arange(config.seq_length).expand(step, -1),
        }
        batch = {name: tensor.to(device()) for name, tensor in batch.items()}
        yield deal_batch(batch, _packs(spec.documents))


def forward_step(
    spec: StepSpec, data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    labels = batch["labels"] if spec.objective == "loss" else None
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=labels,
        packed_seq_params=_packs(spec.documents),
    )
    if spec.objective == "loss":
        return output, partial(_mean_loss, batch)
    return output, partial(_linear_form, spec, model, batch)


def _packs(documents: Sequence[int]) -> PackedSeqParams | None:
    if not documents:
        return None
    ends = torch.tensor([0, *documents], dtype=torch.int32, device=device())
    ends = ends.cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(documents),
        max_seqlen_kv=max(documents),
    )


def _mean_loss(batch: dict[str, torch.Tensor], losses: torch.Tensor) -> tuple:
    tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    total = losses.sum()
    return total, tokens, (total.detach().double(), int(tokens))


def _linear_form(
    spec: StepSpec, model: torch.nn.Module, batch: dict[str, torch.Tensor], logits: torch.Tensor
) -> tuple:
    """Return ``Σ c·logits`` over this rank's rows, positions and vocabulary slice ``[b, s, v/tp]``.

    The coefficients depend on the global row, position and vocabulary index only.
    """
    config = model.config  # type: ignore[attr-defined]
    vocab = padded_vocab_size(
        config.vocab_size,
        config.make_vocab_size_divisible_by,  # type: ignore[arg-type]
        config.tensor_model_parallel_size,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (spec.global_batch_size, config.seq_length, vocab)  # type: ignore[arg-type]
    coefficients = torch.randn(shape, generator=generator, dtype=torch.float64).to(logits)
    rank, width = parallel_state.get_tensor_model_parallel_rank(), logits.size(-1)
    mine = coefficients[batch["row"], batch["position_ids"], rank * width : (rank + 1) * width]
    total = (mine * logits).sum()
    tokens = torch.tensor(batch["row"].numel(), dtype=torch.int, device=logits.device)
    whole = total.detach().double().clone()
    torch.distributed.all_reduce(whole, group=parallel_state.get_tensor_model_parallel_group())
    return total, tokens, (whole, int(tokens))
