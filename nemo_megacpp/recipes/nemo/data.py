"""NeMo's pre-training data module over a folder of ``nemo-megacpp data prepare``."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from pathlib import Path
from typing import Any

from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

from nemo_megacpp.data.builtin import builtin_folder, ensure_builtin
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError


class HybridDataModule(PreTrainingDataModule):
    """``PreTrainingDataModule`` that knows its data by one folder.

    It makes no attention masks: without Transformer Engine NeMo turns them on, ``[1, s, s]`` for
    every sample, and a hybrid stack's attention is causal by its mask type.

    Args:
        folder: written by ``nemo-megacpp data prepare``; the built-in corpus is prepared on first
            use.
        vocab_size: of the model; must be the tokenizer's.
        seq_length: tokens per sample.
        kwargs: of ``PreTrainingDataModule``.

    Raises:
        UserError: for data that is missing, unreadable, too short or of another vocabulary.
    """

    def __init__(self, folder: str, vocab_size: int, seq_length: int, **kwargs: Any):
        self.folder = Path(folder)
        if self.folder == builtin_folder(vocab_size):
            prepared = ensure_builtin(self.folder, vocab_size)
        else:
            prepared = PreparedData.open(self.folder)
        refuse_unfit_data(prepared, self.folder, vocab_size, seq_length)
        heldout = [str(prepared.heldout_prefix)]
        super().__init__(
            {"train": [str(prepared.train_prefix)], "validation": heldout, "test": heldout},
            seq_length=seq_length,
            tokenizer=AutoTokenizer(pretrained_model_name=str(prepared.tokenizer_dir)),
            split=None,  # type: ignore[arg-type]  # three separate files, nothing to split
            **kwargs,
        )
        self.create_attention_mask = False
        self.tokenizer_fingerprint = prepared.tokenizer_fingerprint


def refuse_unfit_data(data: PreparedData, folder: Path, vocab_size: int, seq_length: int) -> None:
    """Refuse data whose vocabulary is not the model's, or that does not fill one sample.

    Raises:
        UserError: with both numbers.
    """
    if data.vocab_size != vocab_size:
        raise UserError(
            f"{folder} was made with a vocabulary of {data.vocab_size}, the model has "
            f"vocab_size={vocab_size}. Leave vocab_size out to take the data's, or prepare the "
            f"data with --vocab-size {vocab_size}."
        )
    for split, counts in data.splits.items():
        if counts.tokens <= seq_length:
            raise UserError(
                f"The {split} split of {folder} has {counts.tokens} tokens; one sample of "
                f"seq_length={seq_length} needs {seq_length + 1}."
            )
