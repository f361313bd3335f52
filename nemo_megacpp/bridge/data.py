"""Prepared data as a dataset provider of Bridge."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from torch.utils.data import Dataset

from nemo_megacpp.data.builtin import ensure_builtin
from nemo_megacpp.data.packed_rows import NO_CACHE, rows_class
from nemo_megacpp.data.prepared import PreparedData, open_blend, weighted_prefixes
from nemo_megacpp.side_channels import read_side_channels


@dataclass
class HybridDataset(DatasetProvider):
    """Rows of prepared data, or of a blend: the rows of the other doors, in their order.

    Attributes:
        sources: weights by folder of ``nemo-megacpp data prepare``; None for the built-in corpus.
        vocab_size, seq_length, side_channels: of the model.
        seed: of the order.
        packed_documents: mark the starts of documents in a row.
        rows_per_evaluation: the held-out rows that every evaluation reads, as at the other doors;
            Bridge's own evaluations read on where the last one ended. 0: all.
        rows_to_read: rows that a resumed run reads from the first one on, with another
            global_batch_size than before more or fewer than its steps would alone.
        dataloader_type: of Bridge: rows in order, once.
        skip_getting_attention_mask_from_dataset: attention is causal by its mask type.
    """

    sources: dict[str, float | None] | None = None
    vocab_size: int = 0
    seq_length: int = 0
    seed: int = 1234
    packed_documents: bool = False
    rows_per_evaluation: int = 0
    rows_to_read: int = field(default=0, init=False)
    side_channels: list[dict[str, Any]] | None = None
    dataloader_type: Any = "single"
    num_workers: int = 0
    pin_memory: bool = False
    persistent_workers: bool = False
    skip_getting_attention_mask_from_dataset: bool = field(default=True, init=False)

    def open(self) -> list[PreparedData]:
        """Open the folders.

        Raises:
            UserError: data that are missing, unreadable, too short, or have another vocabulary.
        """
        if self.sources is None:
            found = [ensure_builtin(self.vocab_size)]
        elif len(self.sources) == 1:
            found = [PreparedData.open(next(iter(self.sources)))]
        else:
            found = open_blend(self.sources)
        channels = read_side_channels(self.side_channels)
        for data in found:
            data.validate_samples(self.vocab_size, self.seq_length)
            data.validate_side_channels(channels)
        return found

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Return the rows to train on and the held-out rows; there is no test set."""
        sources = self.open()
        weights = list((self.sources or {}).values()) if len(sources) > 1 else [None]
        train = weighted_prefixes([data.train_prefix for data in sources], weights)
        heldout = weighted_prefixes([data.heldout_prefix for data in sources], weights)
        channels = read_side_channels(self.side_channels)
        blends = [get_blend_from_list(paths) for paths in (train, heldout)]
        tokenizer = SimpleNamespace(
            vocab_size=sources[0].vocab_size,
            eod=sources[0].eos_id,
            unique_identifiers={"fingerprint": sources[0].tokenizer_fingerprint},
        )
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            blend_per_split=[*blends, None],
            path_to_cache=NO_CACHE,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        rows, held, _ = BlendedMegatronDatasetBuilder(
            rows_class(self.vocab_size, self.packed_documents, channels),
            [max(context.train_samples, self.rows_to_read), context.valid_samples, 0],
            lambda: True,
            config,
        ).build()
        return rows, _Repeated(held, self.rows_per_evaluation or len(held)), None


class _Repeated(Dataset):
    """The first rows of a dataset, again and again to its length.

    Args:
        rows: the dataset.
        count: of the first rows.
    """

    def __init__(self, rows: Dataset, count: int):
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return len(self._rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self._rows[index % self._count]
