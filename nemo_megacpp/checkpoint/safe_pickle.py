"""Pickles of a checkpoint, read without running what they name.

A ``torch_dist`` checkpoint holds three kinds of pickles: ``.metadata`` (read by torch with a bare
``pickle.load``), the objects among its tensors (read with ``torch.load(weights_only=False)``), and
``common.pt``. A pickle names the functions that it calls; each name is looked up here in a list of
classes and rebuilding functions that only hold data, and anything else is refused by its name.
"""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
COMMON = "common.pt"
_MODELOPT = "modelopt_state"
EXTRA_STATE = "_extra_state"
"""Of a Transformer Engine module: a pickle, as bytes in a tensor or in a ``BytesIO``."""

_ZIP = b"PK\x03\x04"
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Magic number of ``torch.save`` before its zip format; storages are still pickled in it."""

# fmt: off
_DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)
_STORAGES = (
    "Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double",
    "ComplexFloat", "ComplexDouble",
)
_NUMPY_DTYPES = (
    "Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64",
    "Float16", "Float32", "Float64",
)
# fmt: on
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
    ("__builtin__", "bytes"),
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
    # The FP8 state of Transformer Engine's modules.
    *(
        ("transformer_engine.common.recipe", name)
        for name in (
            "DelayedScaling",
            "Float8BlockScaling",
            "Float8CurrentScaling",
            "Format",
            "MMParams",
            "MXFP8BlockScaling",
            "NVFP4BlockScaling",
            "QParams",
            "_FormatHelper",
        )
    ),
}
_NESTED = ("torch.storage", "_load_from_bytes")
"""A tensor in a plain pickle: a call of ``torch.load`` on bytes, which are scanned in turn."""


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


class _InertBytes(_Inert):
    """Stands for ``io.BytesIO``: Transformer Engine wraps a whole ``torch.save`` file in one."""

    def __setstate__(self, state: Any) -> None:
        if content := bytes(state[0]):
            _scan(content)


class _InertLoad(_Inert):
    """Stands for ``torch.storage._load_from_bytes``."""

    def __init__(self, content: Any):
        _scan(content)


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    """Stands for ``_codecs.encode`` and ``bytes``, as pickle's protocol 2 calls them."""
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    _NESTED: _InertLoad,
    ("_io", "BytesIO"): _InertBytes,
    ("collections", "OrderedDict"): OrderedDict,
}


class _ObjectScanner(pickle.Unpickler):
    """Goes through the pickle of a ``torch.save`` file, building nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _IN_OBJECTS and (module, name) != _NESTED:
            raise _NotAllowed(f"{module}.{name}")
        return _STAND_INS.get((module, name), _Inert)

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


def scan_torch_file(stream: IO[bytes], what: str) -> Any:
    """Refuse a ``torch.save`` file whose pickle names something that is not on the list.

    Only torch's zip format is read. An archive that two readers might read differently (entries of
    one name, bytes in front, a comment behind) is refused, and so is TorchScript, which
    ``torch.load`` would run.

    Args:
        stream: seekable, the whole file.
        what: its name, for the error.

    Returns:
        What the file holds, with inert stand-ins for all but dictionaries, lists, texts, numbers.

    Raises:
        UserError: naming the file and the name.
    """
    return _guarded(lambda: _scan_zip(stream), what)


def _scan(content: bytes) -> None:
    """Scan what ``torch.load`` would read: its zip format, its older one, or a bare pickle."""
    stream = io.BytesIO(content)
    if content[: len(_ZIP)] == _ZIP:
        _scan_zip(stream)
    elif content[: len(_OLD_FORMAT)] == _OLD_FORMAT:
        for _ in range(5):  # magic number, version, system, object, keys of the storages
            _ObjectScanner(stream).load()
    else:
        _ObjectScanner(stream).load()


def _scan_zip(stream: IO[bytes]) -> Any:
    stream.seek(0)
    if stream.read(len(_ZIP)) != _ZIP:
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
        return _ObjectScanner(io.BytesIO(archive.read(pickles[0]))).load()


def _scan_byte_tensors(stream: IO[bytes]) -> None:
    """Scan the pickles that Transformer Engine puts into tensors, in a file already scanned."""
    import torch

    stream.seek(0)
    # For good, as Megatron has it: torch's context manager would take Megatron's entry off again.
    torch.serialization.add_safe_globals([io.BytesIO, bytes])
    held = torch.load(stream, map_location="cpu", weights_only=True)
    for value in held if isinstance(held, list) else [held]:
        if isinstance(value, torch.Tensor) and value.numel():
            _scan(value.contiguous().view(torch.uint8).numpy().tobytes())


def _keys(held: Any) -> Iterator[str]:
    if isinstance(held, dict):
        yield from (key for key in held if isinstance(key, str))
    if isinstance(held, (dict, list, tuple)):
        for value in held.values() if isinstance(held, dict) else held:
            yield from _keys(value)


def _guarded(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except _NotAllowed as refused:
        raise UserError(
            f"{what} is refused: loading it would call {refused}, which is not among the classes "
            f"that a checkpoint's data needs. Nothing of it has been run."
        ) from None
    except Exception as error:  # damaged bytes make an unpickler raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} cannot be read: {reason}.") from None


def scan_checkpoint(weights: Path, share: int = 0, of: int = 1) -> int:
    """Refuse a distributed checkpoint any of whose pickles names something not on the list.

    Args:
        weights: the folder with ``.metadata`` in it.
        share, of: which part of the objects among the tensors to scan, where ranks divide them.

    Returns:
        Number of pickles scanned.

    Raises:
        UserError: naming the file, the object and the name.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    if (weights / _MODELOPT).exists():
        raise UserError(
            f"{weights / _MODELOPT} is refused: NeMo would load this ModelOpt state with an "
            f"unrestricted unpickler. Remove the folder to load the weights alone."
        )
    metadata = read_metadata(weights)
    places = [
        (index.fqn, place)
        for index, place in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
    ][share::of]
    files = sorted(weights.rglob("*.pt"))
    try:
        for path in files:
            with path.open("rb") as stream:
                held = scan_torch_file(stream, str(path))
            if any(EXTRA_STATE in key for key in _keys(held)):
                raise UserError(f"{path} is refused: {EXTRA_STATE} has no place in it.")
        for name, place in places:
            file, what = weights / place.relative_path, f"{weights / place.relative_path} ({name})"
            if Path(place.relative_path).name != place.relative_path:
                raise UserError(f"{what} is refused: it lies outside of the checkpoint.")
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"{what} is refused: it is stored in a form that is not read here.")
            with file.open("rb") as stream:
                stream.seek(place.offset)
                content = io.BytesIO(stream.read(place.length))
            scan_torch_file(content, what)
            if EXTRA_STATE in name:
                _guarded(functools.partial(_scan_byte_tensors, content), what)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    return 1 + len(files) + len(places)
