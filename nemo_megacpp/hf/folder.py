"""A folder of safetensors files as Hugging Face's libraries read it: written and read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import MinLen
from typing_extensions import TypedDict

from nemo_megacpp.checkpoint.content import TensorInfo
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf.exchange import Exchange, stays_wide
from nemo_megacpp.json_files import Text, read_json
from nemo_megacpp.printable import shown

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
GENERATION = "generation_config.json"
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"
_LIMIT = 256 << 20
"""Most bytes of a JSON file."""
FILE_BYTES = 4 << 30
"""Most bytes of a file, unless the tensors of one exchange are larger."""


class _Index(TypedDict):
    weight_map: Annotated[dict[Text, Text], MinLen(1)]


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder has a model in one of Hugging Face's forms, and not in that of
    ``checkpoint export`` without ``--to``."""
    if not (folder / CONFIG).is_file():
        return False
    if not (any(folder.glob("*.safetensors")) or (folder / _PICKLE).is_file()):
        return False
    return "prefix" not in read_config(folder)


def write_weights(
    folder: Path,
    moves: Sequence[Exchange],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    dtype: str | None,
) -> dict[str, int]:
    """Write the tensors of a format, a file's worth in memory at a time.

    Args:
        folder: to write into.
        moves: from the checkpoint to the format.
        tensors: of the checkpoint, by the model's names.
        read: returns one of them.
        dtype: torch's name of the dtype to convert to; None keeps every tensor's own.

    Returns:
        How many tensors, bytes and files there are now.

    Raises:
        UserError: the checkpoint lacks tensors of its model, or has others.
    """
    import torch
    from safetensors.torch import save_file

    _validate_names(moves, tensors)
    kind = None if dtype is None else getattr(torch, dtype)
    groups = _groups(moves, tensors, None if kind is None else kind.itemsize)
    places: dict[str, str] = {}
    size = 0
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        file = _ONE_FILE if len(groups) == 1 else file
        held: dict[str, Tensor] = {}
        for move in group:
            made = move.there([read(name) for name in move.ours])
            for name, tensor in zip(move.theirs, made, strict=True):
                held[name] = _convert(tensor, name, kind).contiguous()
        save_file(held, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file)
        size += sum(tensor.nbytes for tensor in held.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(folder / _INDEX, index)
    return {"tensors": len(places), "bytes": size, "files": len(groups)}


def _convert(tensor: Tensor, name: str, kind: Any) -> Tensor:
    import torch

    if kind is None:
        return tensor
    return tensor.to(torch.promote_types(kind, torch.float32) if stays_wide(name) else kind)


def _validate_names(moves: Sequence[Exchange], tensors: Mapping[str, TensorInfo]) -> None:
    wanted = {name for move in moves for name in move.ours}
    for text, names in (
        ("it lacks", wanted - tensors.keys()),
        ("it has, beside them,", tensors.keys() - wanted),
    ):
        if names:
            few = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"The checkpoint does not hold its model's tensors: {text} {few}{more}."
            )


def _groups(
    moves: Sequence[Exchange], tensors: Mapping[str, TensorInfo], item: int | None
) -> list[list[Exchange]]:
    groups: list[list[Exchange]] = []
    taken = FILE_BYTES
    for move in moves:
        infos = [tensors[name] for name in move.ours]
        size = sum(i.bytes if item is None else math.prod(i.shape) * max(item, 4) for i in infos)
        if taken + size > FILE_BYTES:
            groups.append([])
            taken = 0
        groups[-1].append(move)
        taken += size
    return groups


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people, too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def readable_like(folder: Path, example: str) -> None:
    """Give the safetensors files the mode of another file: the library makes them private."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / example, path)


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``.

    Raises:
        UserError: it is missing or damaged.
    """
    from pydantic import TypeAdapter

    return read_json(folder / CONFIG, TypeAdapter(dict[str, Any]), _LIMIT)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors: of one safetensors file, of several with an index, or of
    ``pytorch_model.bin``, whose pickle may hold tensors only.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    from pydantic import TypeAdapter

    if (folder / _INDEX).exists():
        places = read_json(folder / _INDEX, TypeAdapter(_Index), _LIMIT)["weight_map"]
        tensors: dict[str, Tensor] = {}
        for file in dict.fromkeys(places.values()):
            if Path(file).name != file:
                raise UserError(f"{folder / _INDEX} is damaged: it names a file {shown(file)}.")
            tensors |= _read_file(folder / file)
        if tensors.keys() != places.keys():
            different = ", ".join(sorted(tensors.keys() ^ places.keys())[:3])
            raise UserError(f"{folder}: {_INDEX} and the files differ in {different}.")
        return tensors
    if (folder / _ONE_FILE).exists():
        return _read_file(folder / _ONE_FILE)
    if (folder / _PICKLE).exists():
        return _read_pickle(folder / _PICKLE)
    raise UserError(f"{folder} has no weights: none of {_ONE_FILE}, {_INDEX}, {_PICKLE}.")


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _validate_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _validate_file(path: Path) -> None:
    if not path.is_file():  # a named pipe would wait for a writer
        what = "it is not a regular file" if path.exists() else "there is no such file"
        raise UserError(f"{path} cannot be read: {what}.")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import torch

    _validate_file(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be read: {reason}.") from None
    if not isinstance(held, dict) or not all(isinstance(t, torch.Tensor) for t in held.values()):
        raise UserError(f"{path} is damaged: it holds something else than tensors by name.")
    return held
