"""Checkpoints that would run code when they are loaded: they make a file whose name is known."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata


class Payload:
    """Its pickle calls ``os.mkdir(path)`` when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.path,)


def torch_bytes(held: Any, **kwargs: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(held, stream, **kwargs)
    return stream.getvalue()


def byte_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read(weights: Path) -> Metadata:
    return pickle.loads((weights / ".metadata").read_bytes())


def in_metadata(weights: Path, payload: Payload) -> None:
    metadata = read(weights)
    metadata.planner_data = payload
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(weights: Path, payload: Payload) -> None:
    (weights / "common.pt").write_bytes(torch_bytes({"args": payload}))


def replace_object(weights: Path, content: bytes) -> str:
    """Let the first object among the tensors be ``content``; return its key."""
    metadata = read(weights)
    index = next(
        index
        for index in metadata.storage_data
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    )
    place = metadata.storage_data[index]
    with (weights / place.relative_path).open("ab") as stream:
        offset = stream.tell()
        stream.write(content)
    metadata.storage_data[index] = replace(place, offset=offset, length=len(content))
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    return index.fqn


def in_object(weights: Path, payload: Payload) -> None:
    replace_object(weights, torch_bytes([payload]))


def in_byte_tensor(weights: Path, payload: Payload) -> None:
    """As Transformer Engine keeps its state; behind a start that is harmless."""
    harmless = pickle.dumps({})
    whole = byte_tensor(harmless + pickle.dumps({"recipe": payload}))
    replace_object(weights, torch_bytes([whole[len(harmless) :]]))


def in_stream(weights: Path, payload: Payload) -> None:
    """As older Transformer Engine kept it."""
    replace_object(weights, torch_bytes([io.BytesIO(torch_bytes(payload))]))


class _Nested:
    def __init__(self, content: bytes):
        self.content = content

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
        return torch.storage._load_from_bytes, (self.content,)  # type: ignore[attr-defined]


def in_nested_load(weights: Path, payload: Payload) -> None:
    """A plain pickle of a tensor calls ``torch.load`` on bytes."""
    replace_object(weights, torch_bytes([_Nested(torch_bytes(payload))]))


def in_nested_old_load(weights: Path, payload: Payload) -> None:
    old = torch_bytes(payload, _use_new_zipfile_serialization=False)
    replace_object(weights, torch_bytes([_Nested(old)]))


def in_modelopt_state(weights: Path, payload: Payload) -> None:
    (weights / "modelopt_state").mkdir()
    (weights / "modelopt_state" / "common.pt").write_bytes(torch_bytes({"state": payload}))


PLACES: dict[str, Callable[[Path, Payload], None]] = {
    "metadata": in_metadata,
    "common": in_common,
    "object": in_object,
    "byte tensor": in_byte_tensor,
    "stream": in_stream,
    "nested load": in_nested_load,
    "nested old load": in_nested_old_load,
    "modelopt state": in_modelopt_state,
}
