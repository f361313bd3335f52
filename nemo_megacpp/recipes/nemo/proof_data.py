"""A proof's rows as a NeMo data module."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import os
from typing import Any, NamedTuple

from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

from nemo_megacpp.proof.rows import Rows
from nemo_megacpp.proof.step_spec import StepSpec


class _Tokenizer(NamedTuple):
    vocab_size: int


class ProofData(PreTrainingDataModule):
    """NeMo's pre-training data module, with :class:`nemo_megacpp.proof.rows.Rows` as its dataset.

    The sampler, which deals rows to microbatches and data-parallel ranks, and the loader are a
    run's own.

    Args:
        spec: of the proof's step.
    """

    def __init__(self, spec: StepSpec):
        super().__init__(
            dict.fromkeys(("train", "validation", "test"), [os.devnull]),  # no files are read
            seq_length=spec.model["seq_length"],
            tokenizer=_Tokenizer(spec.model["vocab_size"]),  # type: ignore[arg-type]
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
