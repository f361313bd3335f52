"""A proof's rows as a NeMo data module."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import os
from typing import Any

from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from nemo.lightning.io import IOMixin

from nemo_megacpp.proof.rows import Rows
from nemo_megacpp.proof.step_spec import StepSpec


class ProofTokenizer(IOMixin):
    """The size of a vocabulary; NeMo builds later virtual stages from what it serialises."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


class ProofData(PreTrainingDataModule):
    """NeMo's pre-training data module, with :class:`nemo_megacpp.proof.rows.Rows` as its dataset.

    The sampler, which deals rows to microbatches and data-parallel ranks, and the loader are a
    run's own.

    Args:
        spec: of the proof's step.
    """

    def __init__(self, spec: StepSpec):
        super().__init__(
            {split: [os.devnull] for split in ("train", "validation", "test")},  # none is read
            seq_length=spec.model["seq_length"],
            tokenizer=ProofTokenizer(spec.model["vocab_size"]),  # type: ignore[arg-type]
            micro_batch_size=spec.micro_batch_size,
            global_batch_size=spec.global_batch_size,
            num_workers=0,
            pin_memory=False,
            split=None,  # type: ignore[arg-type]
            output_log=False,
        )
        self.create_attention_mask = False
        self._spec = spec

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Make the rows; nothing is read or written."""
        self._train_ds = self._validation_ds = self._test_ds = Rows(self._spec)  # type: ignore[assignment]
