"""A checkpoint's model in the form that transformers loads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import new_folder
from nemo_megacpp.checkpoint.manifest import write_manifest
from nemo_megacpp.data.tokenizer import LoadedTokenizer
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf.exchange import EMBEDDING, Exchange, exchanges
from nemo_megacpp.hf.folder import CONFIG, GENERATION, readable_like, write_json, write_weights
from nemo_megacpp.hf.settings import model_fields, read_model
from nemo_megacpp.hf.tokenizer import (
    FIND,
    Choice,
    token_fields,
    tokenizer_of_export,
    write_tokenizer,
)

_REMOTE = Path(__file__).parent / "remote"
_CLASS = "NemoMegacppForCausalLM"
_SUPPRESSED = "suppress_tokens"


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        tensors, bytes, files: how many, of the weights.
        tokenizer: what was copied; None for an export without one.
    """

    tensors: int
    bytes: int
    files: int
    tokenizer: LoadedTokenizer | None


def export_hf(
    source: Path, out: Path, *, dtype: str | None = None, tokenizer: Choice = FIND
) -> Exported:
    """Write a checkpoint's model as a folder that ``AutoModelForCausalLM`` loads with
    ``trust_remote_code=True``.

    Args:
        source: a checkpoint with an identity.
        out: a new folder.
        dtype: one of :data:`nemo_megacpp.hf.settings.DTYPES`; None keeps every tensor's own.
            Decays, step sizes and skips stay at least float32.
        tokenizer: which one to add; by default that of the data of the checkpoint.

    Raises:
        UserError: no checkpoint, a damaged one, a setting that cannot be exported, a tokenizer
            that is not there or of other data, or an ``out`` that exists.
    """
    content = CheckpointContent(source)
    config = read_model(content, dtype)
    rows, kept = embedding_of(content, dtype)
    described = {
        "architectures": [_CLASS],
        "model_type": "nemo_megacpp",
        "auto_map": {
            "AutoConfig": "configuration_nemo_megacpp.NemoMegacppConfig",
            "AutoModelForCausalLM": f"modeling_nemo_megacpp.{_CLASS}",
        },
        "torch_dtype": kept,
        **model_fields(config, rows),
        "source": {"prefix": content.prefix, "identity": content.identity},
    }
    code = [path for path in _REMOTE.glob("*.py") if path.name != "__init__.py"]
    return write_export(
        content, out, exchanges(config), described, dtype=dtype, tokenizer=tokenizer, code=code
    )


def embedding_of(content: CheckpointContent, dtype: str | None) -> tuple[int, str]:
    """Return the rows of the embedding, and the dtype that it will have."""
    info = content.model_tensors[EMBEDDING]
    return info.shape[0], dtype or info.dtype


def write_export(
    content: CheckpointContent,
    out: Path,
    moves: list[Exchange],
    described: dict[str, Any],
    *,
    dtype: str | None,
    tokenizer: Choice,
    code: list[Path],
) -> Exported:
    """Write weights, ``config.json``, ``generation_config.json``, tokenizer and code.

    Args:
        content: the checkpoint; it has an identity.
        out: a new folder.
        moves: from its tensors to the format's.
        described: what ``config.json`` holds, but for special tokens.
        dtype, tokenizer: as in :func:`export_hf`.
        code: files to copy.

    Raises:
        UserError: as :func:`export_hf`.
    """
    from safetensors import SafetensorError

    assert content.identity is not None
    words = content.identity["model"]["vocab_size"]
    rows = described["vocab_size"]
    loaded = tokenizer_of_export(content, tokenizer)
    special = {} if loaded is None else token_fields(loaded)
    tensors = content.model_tensors
    with new_folder(out) as folder:
        try:
            counts = write_weights(
                folder,
                moves,
                tensors,
                lambda name: content.read_tensor(content.prefix + name),
                dtype,
            )
        except SafetensorError as error:
            raise UserError(f"{out} was not written: {error}.") from None
        write_json(folder / CONFIG, {**described, **special})
        # The rows behind the vocabulary are padding, and no token has their ids.
        padding = {_SUPPRESSED: list(range(words, rows))} if words < rows else {}
        write_json(folder / GENERATION, {"do_sample": False, **special, **padding})
        if loaded is not None:
            write_tokenizer(loaded, folder)
        for path in code:
            shutil.copyfile(path, folder / path.name)
        readable_like(folder, CONFIG)
        write_manifest(folder)
    return Exported(**counts, tokenizer=loaded)
