"""NeMo's pre-training data module over a folder of ``nemo-megacpp data prepare``."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from typing import Any, Optional

from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

from nemo_megacpp.data.builtin import ensure_builtin
from nemo_megacpp.data.packed_rows import NO_CACHE, rows_class
from nemo_megacpp.data.prepared import PreparedData, open_blend, weighted_prefixes
from nemo_megacpp.data.tokenizer import guard_library
from nemo_megacpp.errors import UserError
from nemo_megacpp.nemo.recorded import Recorded
from nemo_megacpp.side_channels import read_side_channels


class HybridDataModule(Recorded, PreTrainingDataModule):
    """``PreTrainingDataModule`` over one folder of prepared data, or a blend of several.

    It makes no attention masks: without Transformer Engine NeMo turns them on, ``[1, s, s]`` for
    every sample, and a hybrid stack's attention is causal by its mask type.

    Args:
        folder: written by ``nemo-megacpp data prepare``; None for the built-in corpus, which is
            prepared on first use.
        vocab_size: of the model; must be the tokenizer's.
        seq_length: tokens per sample.
        blend: weights by folder, for Megatron's ``BlendedDataset``; weights that are all None
            follow the numbers of tokens. ``folder`` is then the first, whose tokenizer all share.
        made_with: folder of the tokenizer that the data must have been made with, if given.
        packed_documents: mark the starts of documents in a row, where the model then resets.
        side_channels: those of the model, whose ids the rows then hold.
        kwargs: of ``PreTrainingDataModule``.

    Raises:
        UserError: data that are missing, unreadable, too short, or have another vocabulary or
            tokenizer; an ``index_mapping_dir``.
    """

    def __init__(
        self,
        folder: Optional[str],  # noqa: UP045
        vocab_size: int,
        seq_length: int,
        blend: Optional[dict[str, Optional[float]]] = None,  # noqa: UP045
        made_with: Optional[str] = None,  # noqa: UP045
        packed_documents: bool = False,
        side_channels: Optional[list[dict[str, Any]]] = None,  # noqa: UP045
        **kwargs: Any,
    ):
        if kwargs.pop("index_mapping_dir", None):
            raise UserError(
                "index_mapping_dir: Megatron loads the index files in that folder with pickle, "
                "which can run foreign code. The index is built in memory; leave the setting out."
            )
        if blend is not None:
            sources = open_blend(blend)
        elif folder is None:
            sources = [ensure_builtin(vocab_size)]
        else:
            sources = [PreparedData.open(folder)]
        channels = read_side_channels(side_channels)
        for data in sources:
            data.validate_samples(vocab_size, seq_length)
            data.validate_side_channels(channels)
            if made_with is not None:
                data.validate_tokenizer(made_with)
        weights = list((blend or {}).values()) or [None]
        train = weighted_prefixes([data.train_prefix for data in sources], weights)
        heldout = weighted_prefixes([data.heldout_prefix for data in sources], weights)
        prepared = sources[0]
        with guard_library(prepared.tokenizer_dir):
            tokenizer = AutoTokenizer(
                pretrained_model_name=str(prepared.tokenizer_dir), trust_remote_code=False
            )
        super().__init__(
            {"train": train, "validation": heldout, "test": heldout},
            seq_length=seq_length,
            tokenizer=tokenizer,
            split=None,  # type: ignore[arg-type]  # three separate files, nothing to split
            dataset_cls=rows_class(vocab_size, packed_documents, channels),
            index_mapping_dir=NO_CACHE,
            **kwargs,
        )
        self.create_attention_mask = False
        self.side_channels = channels
        self.tokenizer_fingerprint = prepared.tokenizer_fingerprint
