"""Read a checkpoint's pickles without running what they name.

A ``torch_dist`` checkpoint holds three kinds of pickles. Torch's weights-only unpickler reads two
of them, with the classes below added to torch's and Megatron's lists: ``common.pt``, and the
objects among the tensors, which Megatron loads with ``weights_only=False``. It does not read the
third kind, because it knows only the pickle protocol of ``torch.save``: ``.metadata``, which torch
loads with a bare ``pickle.load``, and the FP8 state that Transformer Engine puts into byte tensors.
:class:`_Unpickler` reads these, with the same lists.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from typing_extensions import TypedDict

from nemo_megacpp.checkpoint.metadata_shape import validate_metadata, validate_places
from nemo_megacpp.checkpoint.pickle_limits import (
    limited_memory,
    validate_pickle,
    validate_torch_file,
    validate_values,
)
from nemo_megacpp.core.checkpoints import COMMON
from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Count, read_json, read_limited
from nemo_megacpp.printable import cut, printable

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
EXTRA_STATE = "_extra_state"
"""Of a Transformer Engine module: a pickle, as bytes in a tensor or in a ``BytesIO``."""
_MODELOPT = "modelopt_state"

# fmt: off
_METADATA_NAMES = {
    "pathlib": ("Path", "PosixPath"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    ),
    # Megatron-Core 0.15 and earlier
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}
_NUMPY_DTYPES = (
    "Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64",
    "Float16", "Float32", "Float64",
)
_FP8_RECIPE = (
    "DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MMParams",
    "MXFP8BlockScaling", "NVFP4BlockScaling", "QParams", "_FormatHelper",
)
# fmt: on
_REFUSED = re.compile(r"GLOBAL (\S+)")
"""How torch's unpickler, and :class:`_Unpickler` like it, reports a name that is not allowed."""
CONFIG = "metadata.json"
"""Megatron's file that says which library wrote a checkpoint."""
_LIMIT = 1 << 30
"""Most bytes of a pickle."""
_CONFIG_LIMIT = 1 << 16


class _Config(TypedDict):
    """Megatron's ``CheckpointingConfig``."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: NotRequired[Count]
    common_backend: NotRequired[Literal["torch"]]
    common_backend_version: NotRequired[Count]


class _Inert:
    """Stands for a class of Transformer Engine, which need not be installed to scan its state."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load_nested(content: bytes) -> Any:
    """Stands for ``torch.storage._load_from_bytes``, which loads with ``weights_only=False``."""
    import torch

    validate_torch_file(content)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


@functools.cache
def _additions() -> dict[str, Any]:
    """Return what a checkpoint may name beyond torch's and Megatron's lists, by full name."""
    import numpy as np

    numpy_functions = {  # numpy 1 and 2 have them in different modules
        "_reconstruct": np.empty(0).__reduce__()[0],
        "scalar": np.float32(0).__reduce__()[0],
    }
    return {
        "builtins.bytes": bytes,
        "builtins.slice": slice,
        "pathlib.Path": Path,
        "torch.storage._load_from_bytes": _load_nested,
        # What Megatron puts in its place, from 0.17 on.
        "megatron.core.safe_globals.safe_load_from_bytes": _load_nested,
        **{f"numpy.dtypes.{n}DType": getattr(np.dtypes, f"{n}DType") for n in _NUMPY_DTYPES},
        **{
            f"numpy.{core}.multiarray.{name}": function
            for core in ("core", "_core")
            for name, function in numpy_functions.items()
        },
        **{f"transformer_engine.common.recipe.{name}": _Inert for name in _FP8_RECIPE},
    }


@functools.cache
def _allowed_in_bare_pickles() -> set[str]:
    from torch._weights_only_unpickler import _get_allowed_globals

    names = {f"{module}.{name}" for module, names in _METADATA_NAMES.items() for name in names}
    return names | _get_allowed_globals().keys()


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of any protocol within :func:`_guarded`, and builds only what is listed."""

    def find_class(self, module: str, name: str) -> Any:
        from torch._weights_only_unpickler import _get_user_allowed_globals

        path, listed = f"{module}.{name}", _get_user_allowed_globals()
        if path in listed:
            return listed[path]
        if path not in _allowed_in_bare_pickles():
            raise pickle.UnpicklingError(f"GLOBAL {path}")
        return super().find_class(module, name)


def _guarded(load: Callable[[], Any], what: str, size: int) -> Any:
    """Return what ``load`` returns, under our lists and nothing else that the process allows.

    Args:
        load: reads a pickle.
        what: its name, for the error.
        size: in bytes.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS
    from torch import serialization

    # Torch's context manager keeps the process's own entries, and removes Megatron's at its end.
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    additions = [(found, name) for name, found in _additions().items()]
    serialization.add_safe_globals([*SAFE_GLOBALS, *additions])
    try:
        with limited_memory(size):
            held = load()
            validate_values(held, size)
            return held
    except Exception as error:  # damaged bytes make an unpickler raise anything
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        if isinstance(error, pickle.UnpicklingError) and (refused := _REFUSED.search(reason)):
            raise UserError(
                f"{what} is refused: loading it would call {cut(printable(refused[1]), 200)}, "
                f"which is not among the classes that a checkpoint's data needs. Nothing in it was "
                f"run."
            ) from None
        reason = cut((reason or type(error).__name__).splitlines()[0].rstrip("."), 200)
        raise UserError(f"{what} cannot be read: {reason}.") from None
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def read_metadata(weights: Path) -> Metadata:
    """Return a distributed checkpoint's ``.metadata``, read with a restricted unpickler.

    Raises:
        UserError: it is missing or damaged, or names something that is not allowed.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = weights / METADATA
    content = read_limited(path, _LIMIT)

    def load() -> Any:
        validate_pickle(content)
        return _Unpickler(io.BytesIO(content)).load()

    metadata = _guarded(load, str(path), len(content))
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} is damaged: it holds no checkpoint metadata.")
    validate_metadata(path, metadata)
    return metadata


def read_torch_file(path: Path) -> Any:
    """Return what a ``torch.save`` file holds, read by torch's weights-only unpickler.

    Raises:
        UserError: it is missing, too large, damaged or TorchScript, or names something that is not
            allowed.
    """
    return _read_torch(read_limited(path, _LIMIT), str(path))


def _read_torch(content: bytes, what: str) -> Any:
    import torch

    def load() -> Any:
        validate_torch_file(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    return _guarded(load, what, len(content))


def _scan_extra_state(held: Any) -> None:
    """Scan Transformer Engine's state with the reader that Megatron and it would load it with."""
    import torch

    for value in held if isinstance(held, list) else [held]:
        if isinstance(value, io.BytesIO) and value.getbuffer().nbytes:
            _load_nested(value.getvalue())
        elif isinstance(value, torch.Tensor) and value.numel():
            content = value.contiguous().view(torch.uint8).numpy().tobytes()
            validate_pickle(content)
            _Unpickler(io.BytesIO(content)).load()


def _keys(held: Any) -> Iterator[str]:
    if isinstance(held, dict):
        yield from (key for key in held if isinstance(key, str))
    if isinstance(held, (dict, list, tuple)):
        for value in held.values() if isinstance(held, dict) else held:
            yield from _keys(value)


def read_object(weights: Path, metadata: Metadata, name: str) -> Any:
    """Return one of the objects among the tensors of a checkpoint.

    Args:
        weights: the folder with ``.metadata`` in it.
        metadata: what it holds.
        name: of the object.

    Raises:
        UserError: it is damaged, or names something that is not allowed.
    """
    validate_places(weights, metadata)
    (place,) = (place for index, place in metadata.storage_data.items() if index.fqn == name)
    return _read_object(weights, name, place)[0]


def _read_object(weights: Path, name: str, place: Any) -> tuple[Any, str, int]:
    """Return an object, its place in words for messages, and its bytes."""
    file, what = weights / place.relative_path, f"{weights / place.relative_path} ({name})"
    if place.transform_descriptors:
        raise UserError(f"{what} is refused: transformed storage is not supported.")
    if place.length > _LIMIT:
        raise UserError(f"{what} is damaged: it is larger than {_LIMIT:,} bytes.")
    try:
        with file.open("rb") as stream:
            stream.seek(place.offset)
            content = stream.read(place.length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    return _read_torch(content, what), what, len(content)


def scan_checkpoint(weights: Path, share: int = 0, of: int = 1) -> int:
    """Refuse a distributed checkpoint any of whose pickles names something that is not allowed.

    Args:
        weights: the folder with ``.metadata`` in it.
        share, of: which part of the objects among the tensors to scan, where ranks divide them.

    Returns:
        Number of pickles scanned.

    Raises:
        UserError: naming the file, the object and the name.
    """
    from pydantic import TypeAdapter
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    if (weights / _MODELOPT).exists():
        raise UserError(
            f"{weights / _MODELOPT} is refused: NeMo would load this ModelOpt state with an "
            f"unrestricted unpickler. Remove the folder to load only the weights."
        )
    if (config := weights / CONFIG).exists():
        read_json(config, TypeAdapter(_Config), _CONFIG_LIMIT)
    metadata = read_metadata(weights)
    validate_places(weights, metadata)
    places = [
        (index.fqn, place)
        for index, place in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    ][share::of]
    files = sorted(weights.rglob("*.pt"))
    for path in files:
        held = read_torch_file(path)
        if path.name == COMMON and not isinstance(held, dict):
            raise UserError(f"{path} is damaged: it holds a {type(held).__name__}, not a mapping.")
        if any(EXTRA_STATE in key for key in _keys(held)):
            raise UserError(f"{path} is refused: {EXTRA_STATE} does not belong in this file.")
    for name, place in places:
        held, what, size = _read_object(weights, name, place)
        if EXTRA_STATE in name:
            _guarded(functools.partial(_scan_extra_state, held), what, size)
    return 1 + len(files) + len(places)
