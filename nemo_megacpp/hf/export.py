"""A checkpoint's model in the form that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import new_folder
from nemo_megacpp.checkpoint.manifest import write_manifest
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf.exchange import EMBEDDING, Exchange, exchanges
from nemo_megacpp.hf.folder import CONFIG, GENERATION, readable_like, write_json, write_weights
from nemo_megacpp.hf.settings import model_fields, read_model
from nemo_megacpp.hf.tokenizer import find_tokenizer, token_fields, write_tokenizer

_REMOTE = Path(__file__).parent / "remote"
_CLASS = "NemoMegacppForCausalLM"
_SUPPRESSED = "suppress_tokens"


def export_hf(
    source: Path, out: Path, *, dtype: str | None = None, tokenizer: Path | None = None
) -> dict[str, int]:
    """Write a checkpoint's model as a folder that ``AutoModelForCausalLM`` loads with
    ``trust_remote_code=True``.

    Args:
        source: a checkpoint with an identity.
        out: a new folder.
        dtype: one of :data:`nemo_megacpp.hf.settings.DTYPES`; None keeps every tensor's own.
            Decays, step sizes and skips stay at least float32.
        tokenizer: folder of ``tokenizer.json``, or prepared data with one.

    Returns:
        How many tensors, bytes and files were written.

    Raises:
        UserError: no checkpoint, a damaged one, a setting that cannot be exported, the tokenizer
            of other data, or an ``out`` that exists.
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
    tokenizer: Path | None,
    code: list[Path],
) -> dict[str, int]:
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
    loaded = find_tokenizer(tokenizer, content.identity["tokenizer"], words)
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
    return counts
