"""Limits on a pickle, before it is loaded, and on the values that come out of it.

An unpickler that calls nothing foreign can still be made to work for hours, to fill the memory or
to overflow the C stack, by a file of a few hundred bytes: shared references that double at each
level, tuples nested a million deep, an index of 2³² into its memo. Nobody needs such a file.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import resource
import zipfile
from collections.abc import Iterator
from typing import Any

import psutil

DEPTH = 200
"""Deepest nesting of a pickle's values."""
_MOST_VALUES = 20_000_000
_FREE_VALUES = 100_000
"""Values that a pickle of any size may hold; more where it has the bytes for them."""
_LINE = 1000
"""Longest name of a class, and longest number, of the pickle protocols' text lines."""
_BITS = 1024
"""Of an integer; a random generator's state has 128."""
_FREE_TENSOR = 1 << 20
"""Bytes up to which a tensor may be larger than its storage."""
_MEMORY = 1 << 30
_MEMORY_PER_BYTE = 16
_LEGACY_PICKLES = 5
"""At the start of a file of ``torch.save`` that is no ZIP archive."""


def _effects() -> dict[str, tuple[int, bool, int]]:
    """Return how many values an opcode pops, whether it also pops to the mark, and pushes."""
    found = {}
    for op in pickletools.opcodes:
        to_mark = pickletools.markobject in op.stack_before
        fixed = [
            item
            for item in op.stack_before
            if item not in (pickletools.markobject, pickletools.stackslice)
        ]
        inside = to_mark and op.name == "OBJ"  # its class lies above the mark
        found[op.name] = (0 if inside else len(fixed), to_mark, len(op.stack_after))
    return found


_EFFECTS = _effects()


def validate_pickle(content: bytes | io.BytesIO) -> None:
    """Refuse a pickle that nests too deep or uses its memo as no pickler does; builds nothing.

    Raises:
        pickle.UnpicklingError: with the reason; the opcodes of a damaged pickle raise others.
    """
    stack: list[int | None] = []  # depth of each value; None for a mark
    memo: dict[int, int] = {}
    op: Any
    argument: Any
    for number, (op, argument, _) in enumerate(pickletools.genops(content)):
        name = op.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if name == "MEMOIZE" else argument
            if index > number:
                raise pickle.UnpicklingError(f"it keeps its value {number} under {index}")
            memo[index] = stack[-1] or 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            is_line = isinstance(argument, str) and op.arg.n == pickletools.UP_TO_NEWLINE
            if is_line and len(argument) > _LINE:
                raise pickle.UnpicklingError(f"a name has {len(argument):,} characters")
            fixed, to_mark, pushed = _EFFECTS[name]
            inside = -1
            while to_mark and (popped := stack.pop()) is not None:
                inside = max(inside, popped)
            for _ in range(fixed):
                inside = max(inside, stack.pop() or 0)
            if inside > DEPTH:
                raise pickle.UnpicklingError(f"its values are nested deeper than {DEPTH}")
            stack += [inside + 1] * pushed


def validate_torch_file(content: bytes) -> None:
    """Apply :func:`validate_pickle` to the pickles of a ``torch.save`` file.

    Raises:
        pickle.UnpicklingError: with the reason, also for a compressed archive, which torch never
            writes; a damaged file raises others.
    """
    if not content.startswith(b"PK\x03\x04"):
        stream = io.BytesIO(content)
        for _ in range(_LEGACY_PICKLES):
            if stream.tell() < len(content):
                validate_pickle(stream)
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise pickle.UnpicklingError("its records are compressed")
        if sum(record.file_size for record in records) > len(content):
            raise pickle.UnpicklingError("its records are larger than the file")
        for record in records:
            if record.filename.endswith("/data.pkl"):
                validate_pickle(archive.read(record))


def validate_values(held: Any, size: int) -> None:
    """Refuse values that a reader without a memory of what it has seen could not walk through.

    Args:
        held: what came out of a pickle.
        size: bytes of its file.

    Raises:
        pickle.UnpicklingError: nesting too deep or endless, more values than the file has bytes
            for, a number of thousands of digits, or a tensor larger than its storage.
    """
    import torch

    most = min(_MOST_VALUES, _FREE_VALUES + size)
    count, left = 0, [iter([held])]
    while left:
        value = next(left[-1], left)
        if value is left:
            left.pop()
            continue
        count += 1
        if count > most:
            raise pickle.UnpicklingError(f"its values refer to each other more than {most:,} times")
        if isinstance(value, int) and value.bit_length() > _BITS:
            raise pickle.UnpicklingError(f"a number has {value.bit_length():,} bits")
        if isinstance(value, torch.Tensor):
            _validate_tensor(value)
            continue
        if inside := _inside(value):
            if len(left) > DEPTH:
                raise pickle.UnpicklingError(f"its values are nested deeper than {DEPTH}")
            left.append(iter(inside))


def _inside(value: Any) -> list[Any]:
    if isinstance(value, str | bytes | bytearray | int | float | type | None):
        return []
    found: list[Any] = []
    if isinstance(value, dict):
        found += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        found += value
    held = getattr(value, "__dict__", None)
    return found + list(held.values()) if isinstance(held, dict) else found


def _validate_tensor(tensor: Any) -> None:
    import torch

    if tensor.layout != torch.strided:
        raise pickle.UnpicklingError(f"a tensor has the layout {tensor.layout}")
    size = tensor.numel() * tensor.element_size()
    there = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
    if size > max(there, _FREE_TENSOR):
        raise pickle.UnpicklingError(f"a tensor of {size:,} bytes has a storage of {there:,}")


@contextlib.contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Let what this process allocates in the block, for a file of ``size`` bytes, end in
    a MemoryError rather than in the kernel's choice of a process to kill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + _MEMORY + _MEMORY_PER_BYTE * size
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    with contextlib.suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(resource.RLIMIT_AS, (min([most, *known]), hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
