"""Pickles of a checkpoint, read without running what they name.

A ``torch_dist`` checkpoint holds three kinds of pickles: ``.metadata`` (read by torch with a bare
``pickle.load``), the objects among its tensors (read with ``torch.load(weights_only=False)``), and
``common.pt``. A pickle names the functions that it calls; each name is looked up here in a list of
classes and rebuilding functions that only hold data, and anything else is refused by its name.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
COMMON = "common.pt"

_DTYPES = [
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
]
_STORAGES = [
    "Bool",
    "Byte",
    "Char",
    "Short",
    "Int",
    "Long",
    "Half",
    "BFloat16",
    "Float",
    "Double",
    "ComplexFloat",
    "ComplexDouble",
    "Untyped",
]
_NUMPY_DTYPES = [
    "Bool",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "UInt8",
    "UInt16",
    "UInt32",
    "UInt64",
    "Float16",
    "Float32",
    "Float64",
]

_TORCH_DATA = {("torch", name) for name in (*_DTYPES, "Size", "device")}
_IN_METADATA = {
    *_TORCH_DATA,
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in (
            "BytesIOWriteData",
            "SavePlan",
            "TensorWriteData",
            "WriteItem",
            "WriteItemType",
        )
    ),
    # What Megatron-Core 0.15 and before wrote.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}
_IN_OBJECTS = {
    *_TORCH_DATA,
    *(("torch", f"{name}Storage") for name in _STORAGES),
    *(("torch.storage", f"{name}Storage") for name in ("Typed", "Untyped")),
    *(("numpy.dtypes", f"{name}DType") for name in _NUMPY_DTYPES),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("_codecs", "encode"),  # bytes, in the pickle protocol of torch.save
    ("__builtin__", "set"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("builtins", "bytearray"),
    ("builtins", "complex"),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("_io", "BytesIO"),
    ("signal", "Signals"),
    ("megatron.core.enums", "ModelType"),
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    ("megatron.core.rerun_state_machine", "RerunDiagnostic"),
    ("megatron.core.rerun_state_machine", "RerunMode"),
    ("megatron.core.rerun_state_machine", "RerunState"),
    ("megatron.core.transformer.enums", "AttnBackend"),
    ("megatron.core.transformer.enums", "CudaGraphScope"),
}


class _NotAllowed(pickle.UnpicklingError):
    pass


class _MetadataUnpickler(pickle.Unpickler):
    """Builds torch's classes of ``.metadata`` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _IN_METADATA:
            raise _NotAllowed(f"{module}.{name}")
        return super().find_class(module, name)


class _Inert:
    """Stands for whatever a pickle builds, while it is only looked at: takes all, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _ObjectScanner(pickle.Unpickler):
    """Goes through the pickle of a ``torch.save`` file, building nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _IN_OBJECTS:
            raise _NotAllowed(f"{module}.{name}")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()  # a tensor's storage


def read_metadata(weights: Path) -> Metadata:
    """Return a distributed checkpoint's ``.metadata``, read with a restricted unpickler.

    Raises:
        UserError: it is missing or damaged, or names something that is not on the list.
    """
    path = weights / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _guarded(_MetadataUnpickler(stream).load, str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    from torch.distributed.checkpoint.metadata import Metadata

    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path} is damaged: it holds no checkpoint metadata.")
    return metadata


def scan_torch_file(stream: IO[bytes], what: str) -> None:
    """Refuse a ``torch.save`` file whose pickle names something that is not on the list.

    Only torch's zip format is read. An archive that two readers might read differently (entries of
    one name, bytes in front, a comment behind) is refused, and so is TorchScript, which
    ``torch.load`` would run.

    Args:
        stream: seekable, the whole file.
        what: its name, for the error.

    Raises:
        UserError: naming the file and the name.
    """
    _guarded(lambda: _ObjectScanner(io.BytesIO(_pickle_in(stream))).load(), what)


def _pickle_in(stream: IO[bytes]) -> bytes:
    stream.seek(0)
    if stream.read(4) != b"PK\x03\x04":
        raise pickle.UnpicklingError("it is no zip archive of torch.save")
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        pickles = [name for name in names if name.endswith(".pkl")]
        if archive.comment or len(set(names)) != len(names):
            raise pickle.UnpicklingError("its zip archive is ambiguous")
        if min(entry.header_offset for entry in entries) != 0:
            raise pickle.UnpicklingError("its zip archive does not begin at its first byte")
        if len(pickles) != 1 or pickles[0].rpartition("/")[2] != "data.pkl":
            raise pickle.UnpicklingError(f"it should hold one data.pkl and holds {pickles}")
        return archive.read(pickles[0])


def _guarded(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except _NotAllowed as refused:
        raise UserError(
            f"{what} is refused: loading it would call {refused}, which is not among the classes "
            f"that a checkpoint's data needs. Nothing of it has been run."
        ) from None
    except Exception as error:  # damaged bytes make an unpickler raise anything
        raise UserError(f"{what} cannot be read: {error or type(error).__name__}.") from None


def object_items(metadata: Metadata) -> Iterator[tuple[str, Any]]:
    """Yield key and place of the pickled objects among a checkpoint's tensors.

    The place has ``relative_path``, ``offset`` and ``length`` (bytes).
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            yield index.fqn, place
