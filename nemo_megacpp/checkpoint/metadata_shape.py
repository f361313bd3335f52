"""What ``.metadata`` of a distributed checkpoint must hold once it is unpickled."""

from __future__ import annotations

import math
import stat
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from annotated_types import MaxLen

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Count, check_shape
from nemo_megacpp.printable import shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from torch.distributed.checkpoint.metadata import Metadata

Name = Annotated[str, MaxLen(1024)]
Sizes = Annotated[tuple[Count, ...], MaxLen(32)]


class _Shapes(NamedTuple):
    whole: TypeAdapter[Any]
    tensors: TypeAdapter[Any]
    places: TypeAdapter[Any]


@cache
def _shapes() -> _Shapes:
    """Declare the attributes that torch, Megatron or this package reads."""
    import torch
    from pydantic import BaseModel, ConfigDict, InstanceOf, TypeAdapter
    from torch.distributed.checkpoint import metadata as saved

    class Declared(BaseModel):
        model_config = ConfigDict(strict=True, from_attributes=True, arbitrary_types_allowed=True)

    class Properties(Declared):
        dtype: InstanceOf[torch.dtype]

    class Chunk(Declared):
        offsets: Sizes
        sizes: Sizes

    class Tensor(Declared):
        properties: Properties
        size: Sizes
        chunks: list[Chunk]

    class Index(Declared):
        fqn: Name
        offset: Sizes | None

    class Place(Declared):
        relative_path: Name
        offset: Count
        length: Count
        transform_descriptors: list[Name] | None

    class Whole(Declared):
        state_dict_metadata: dict[
            Name,
            InstanceOf[saved.TensorStorageMetadata] | InstanceOf[saved.BytesStorageMetadata],
        ]
        storage_data: dict[InstanceOf[saved.MetadataIndex], Any]

    return _Shapes(
        TypeAdapter(Whole), TypeAdapter(dict[Name, Tensor]), TypeAdapter(list[tuple[Index, Place]])
    )


def validate_metadata(path: Path, metadata: Metadata) -> None:
    """Check types and sizes of an unpickled ``.metadata``, and that its parts agree.

    Raises:
        UserError: naming the first attributes that are wrong or missing; a shard that is not inside
            its tensor, is saved nowhere, or has fewer bytes than elements; a file outside the
            folder.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    check_shape(metadata, _shapes().whole, path)
    saved, places = metadata.state_dict_metadata, metadata.storage_data
    tensors = {n: held for n, held in saved.items() if isinstance(held, TensorStorageMetadata)}
    check_shape(tensors, _shapes().tensors, path)
    check_shape(list(places.items()), _shapes().places, path)
    lengths: dict[tuple[str, tuple[int, ...] | None], int | None] = {}
    for index, place in places.items():
        if index.fqn not in saved:
            raise UserError(f"{path} is damaged: it does not describe {shown(index.fqn)}.")
        name = place.relative_path
        if Path(name).name != name or name == "..":
            raise UserError(
                f"{path} is refused: it places {shown(index.fqn)} in {shown(name)}, which is "
                f"outside the checkpoint."
            )
        offset = None if index.offset is None else tuple(index.offset)
        lengths[index.fqn, offset] = None if place.transform_descriptors else place.length
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            bounds = zip(chunk.offsets, chunk.sizes, tensor.size, strict=False)
            same = len(chunk.offsets) == len(chunk.sizes) == len(tensor.size)
            where = f"{path} is damaged: the shard of {shown(name)} at {list(chunk.offsets)}"
            if not same or any(start + size > end for start, size, end in bounds):
                raise UserError(
                    f"{where}, of shape {list(chunk.sizes)}, is not inside the tensor's "
                    f"{list(tensor.size)}."
                )
            if (key := (name, tuple(chunk.offsets))) not in lengths:
                raise UserError(f"{where} is in no file.")
            needed = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            if (length := lengths[key]) is not None and length < needed:
                raise UserError(f"{where} has {length:,} bytes instead of {needed:,}.")


def validate_places(weights: Path, metadata: Metadata) -> None:
    """Check that each shard lies inside a regular file.

    Raises:
        UserError: naming the file.
    """
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    for name, end in sorted(ends.items()):
        path = weights / name
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is refused: it is not a regular file.")
        if found.st_size < end:
            raise UserError(f"{path} has {found.st_size:,} bytes instead of at least {end:,}.")
