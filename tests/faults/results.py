"""What a command that exited with 0 has made or accepted, as digests that can be compared."""

from __future__ import annotations

import hashlib
from pathlib import Path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def of_checkpoint(path: str) -> dict[str, str]:
    """Return the digest of every whole tensor of a checkpoint, by its name."""
    import torch

    from nemo_megacpp.checkpoint.content import CheckpointContent

    content = CheckpointContent(Path(path))
    found = {}
    for name in content.tensors:
        raw = content.read_tensor(name).contiguous().reshape(-1).view(torch.uint8)
        found[name] = _digest(raw.numpy().tobytes())
    return found


def of_export(path: str) -> dict[str, str]:
    """Return the digest of every tensor of an exported folder, by its name."""
    from safetensors.numpy import load_file

    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        for name, value in load_file(file).items():
            found[name] = _digest(value.tobytes())
    return found


def of_rows(folder: str) -> dict[str, str]:
    """Return the digest of all rows of an epoch of prepared data."""
    from nemo_megacpp.data.packed_rows import read_rows
    from nemo_megacpp.data.prepared import PreparedData

    digest = hashlib.sha256()
    for parts in read_rows(PreparedData.open(folder), 1 << 30, 64):
        digest.update(repr(parts).encode())
    return {"rows": digest.hexdigest()}


def of_data_module(folder: str) -> dict[str, str]:
    """Return what NeMo's tokenizer makes of a text, through the data module of a run."""
    from nemo_megacpp.data.prepared import PreparedData
    from nemo_megacpp.nemo.data_module import HybridDataModule

    module = HybridDataModule(folder, PreparedData.open(folder).vocab_size, seq_length=64)
    return {"ids": repr(module.tokenizer.text_to_ids("word1 and 2 more, for a start"))}
