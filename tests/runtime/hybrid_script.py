"""A training script on Megatron's own trainer: ``pretrain_hybrid.py`` in short, which no wheel has.

Beside its checkpoints it writes the fields of the model's configuration.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from torch.utils.data import Dataset

VOCABULARY = 384


def name_of(value: Any) -> str:
    """Return a field's value as text; a function by its name."""
    return getattr(value, "__name__", repr(value))


class Rows(Dataset):
    """Rows of random tokens, the same for every rank."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        row = torch.randint(VOCABULARY, (self.length + 1,), generator=generator)
        return {"tokens": row[:-1], "labels": row[1:], "positions": torch.arange(self.length)}


def datasets(samples: Any, vp_stage: int | None = None) -> tuple[Rows, Rows, Rows]:
    """Return rows to train, validate and test on."""
    length = get_args().seq_length
    return Rows(length), Rows(length), Rows(length)


datasets.is_distributed = True  # type: ignore[attr-defined]


def _total(losses: torch.Tensor, model: Any = None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    total, tokens = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
    return total, tokens, {"lm loss": torch.cat([total.detach().view(1), tokens.view(1)])}


def forward_step(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one microbatch."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return losses, partial(_total, model=model)


if __name__ == "__main__":
    args = parse_and_validate_args()
    model = hybrid_config_from_args(args)
    if args.rank == 0 and args.save:
        plain = model.transformer
        fields = {
            field.name: name_of(getattr(plain, field.name)) for field in dataclasses.fields(plain)
        }
        folder = Path(args.save).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fields.json").write_text(json.dumps(fields))
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
