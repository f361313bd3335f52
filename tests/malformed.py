"""Malformed files, made from whole ones or from nothing, by a seeded source of chance.

Every function takes a :class:`random.Random`: a campaign gives ``random.Random(seed)``, a property
based test hypothesis's ``strategies.randoms(use_true_random=False)``, which also shrinks.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nemo_megacpp.checkpoint import manifest

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066\u2028\x7f\r"
"""Sets a terminal's title, clears it, and turns the text around."""

_RAW = {
    "huge number": "9" * 400,
    "too many digits": "9" * 5000,
    "infinity": "1e999",
    "NaN": "NaN",
    "deep list": "[" * 5000 + "]" * 5000,
    "deep object": '{"a":' * 5000 + "1" + "}" * 5000,
    "surrogate": '"\\ud800"',
    "open": "[",
}
"""JSON texts that no value of Python writes, by a mark that stands for them."""
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**64, -(2**63), 1.5, 1e300),
    *("", "0", "x" * 100_000, "../../etc/passwd", "/etc/passwd", "a\0b", ESCAPES),
    *([], {}, [None], [[]], {"": None}, [0] * 1000),
)


def mutate_json(chance: random.Random, content: bytes) -> bytes:
    """Return a JSON text with one thing changed: a value replaced, dropped, moved, or a key."""
    held = json.loads(content)
    places = list(_json_places(held))
    mark = None
    if not places:
        return chance.choice([b"", b"null", b"[]", b"{"])
    owner, key = chance.choice(places)
    how = chance.choice(["value", "value", "raw", "drop", "rename", "move", "wrap", "twice"])
    if how == "value":
        owner[key] = copy.deepcopy(chance.choice(_VALUES))
    elif how == "raw":
        mark = chance.choice(sorted(_RAW))
        owner[key] = f"<{mark}>"
    elif how == "drop":
        del owner[key]
    elif how == "rename" and isinstance(owner, dict):
        owner[chance.choice(["", "x", ESCAPES, "x" * 100_000])] = owner.pop(key)
    elif how == "move":
        other, there = chance.choice(places)
        owner[key] = copy.deepcopy(other[there])
    else:
        owner[key] = [owner[key]] * (2 if how == "twice" else 1)
    text = json.dumps(held)
    if mark is not None:
        text = text.replace(f'"<{mark}>"', _RAW[mark])
    return text.encode()


def mutate_manifest(chance: random.Random, content: bytes) -> bytes:
    """Return a manifest with one thing changed, and a checksum of its own that fits again."""
    changed = mutate_json(chance, content)
    try:
        held = json.loads(changed)
        del held["own_checksum"]
        return json.dumps({**held, "own_checksum": manifest._own_checksum(held)}).encode()
    except (KeyError, TypeError, ValueError, RecursionError):
        return changed


def _json_places(held: Any) -> Iterator[tuple[Any, Any]]:
    pairs: Any = held.items() if isinstance(held, dict) else ()
    for key, value in enumerate(held) if isinstance(held, list) else pairs:
        yield held, key
        yield from _json_places(value)


def mutate_bytes(chance: random.Random, content: bytes) -> bytes:
    """Return content with a bit flipped, a byte replaced, a part cut out, doubled, or swapped."""
    if not content:
        return b"\0"
    at = chance.randrange(len(content))
    end = min(len(content), at + chance.choice([1, 2, 8, 64, 4096]))
    how = chance.choice(["flip", "byte", "truncate", "cut", "double", "zero", "swap"])
    if how == "flip":
        middle = bytes([content[at] ^ (1 << chance.randrange(8))])
        return content[:at] + middle + content[at + 1 :]
    if how == "byte":
        return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
    if how == "truncate":
        return content[:at]
    if how == "cut":
        return content[:at] + content[end:]
    if how == "double":
        return content[:end] + content[at:]
    if how == "zero":
        return content[:at] + bytes(end - at) + content[end:]
    start = chance.randrange(len(content))
    return content[:at] + content[start : start + end - at] + content[end:]


# --- pickles


def mutate_pickle(chance: random.Random, content: bytes) -> bytes:
    """Return a bare pickle, such as ``.metadata``, with one of its values replaced."""
    while True:
        # torch's classes refuse to write some values.
        with contextlib.suppress(RuntimeError):
            return pickle.dumps(mutate_value(chance, pickle.loads(content)))


def mutate_torch_file(chance: random.Random, content: bytes) -> bytes:
    """Return a file of ``torch.save``, such as ``common.pt``, with one of its values replaced."""
    held = torch.load(io.BytesIO(content), weights_only=False)
    stream = io.BytesIO()
    torch.save(mutate_value(chance, held), stream)
    return stream.getvalue()


def mutate_value(chance: random.Random, held: Any) -> Any:
    """Return a copy of ``held`` in which one value, or key, is another one."""
    seen: list[Any] = []
    _rewrite(held, lambda value: (seen.append(value), value)[1])
    target, count = chance.randrange(len(seen)), -1
    values = [*_VALUES, 10**400, torch.Size([2**40, 2**40]), torch.zeros(1).expand(2**36), seen[0]]
    new = chance.choice([*values, chance.choice(seen)])

    def visit(value: Any) -> Any:
        nonlocal count
        count += 1
        return new if count == target else value

    return _rewrite(held, visit)


def _rewrite(held: Any, visit: Callable[[Any], Any]) -> Any:
    changed = visit(held)
    if changed is not held:
        return changed
    if isinstance(held, dict):
        new = copy.copy(held)
        new.clear()
        for key, value in held.items():
            other = _rewrite(key, visit)
            new[other if _hashable(other) else key] = _rewrite(value, visit)
        return new
    if isinstance(held, list | tuple):
        items = [_rewrite(value, visit) for value in held]
        try:
            return type(held)(items)
        except TypeError:  # torch.Size holds integers only
            return tuple(items)
    if type(held).__module__.split(".")[0] in ("torch", "megatron") and hasattr(held, "__dict__"):
        if isinstance(held, torch.Tensor | torch.dtype | type):
            return held
        new = copy.copy(held)
        for name, value in vars(held).items():
            object.__setattr__(new, name, _rewrite(value, visit))
        return new
    return held


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except (TypeError, RecursionError):
        return False
    return True


def hostile_pickles() -> Iterator[tuple[str, bytes]]:
    """Yield names and bare pickles (protocol 2) that are small, run nothing, and cost much."""
    depth = 100_000
    shared = b"]"
    for number in range(60):  # each list holds the one before twice
        shared = b"](" + shared + b"q" + bytes([number]) + b"h" + bytes([number]) + b"e"
    start, stop = b"\x80\x02", b"."
    yield "shared references", start + shared + stop
    pairs = b"}" + b"".join(
        b"q" + bytes([n]) + b"}(U\x01ah" + bytes([n]) + b"U\x01bh" + bytes([n]) + b"u"
        for n in range(60)
    )
    yield "shared dictionaries", start + pairs + stop
    yield "deep list", start + b"]" * depth + b"a" * (depth - 1) + stop
    yield "deep dictionary", start + b"}U\x01a" * depth + b"Ns" + b"s" * (depth - 1) + stop
    yield "deep tuple", start + b")" + b"\x85" * depth + stop
    yield "deep key", start + b"})" + b"\x85" * 2_000_000 + b"Ns" + stop
    yield "contains itself", start + b"]q\x00h\x00a" + stop
    yield "dictionary in itself", start + b"}q\x00U\x01ah\x00s" + stop
    yield "long number", start + b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20) + stop
    yield "many digits", start + b"I" + b"9" * 100_000 + b"\n" + stop
    yield "text without an end", start + b"X" + struct.pack("<I", 2**31 - 1) + b"x"
    yield "bytes without an end", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x"
    yield "array without an end", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x"
    yield "large memo", start + b"Nr" + struct.pack("<I", 2**32 - 1) + stop
    doubled = b"c_codecs\nencode\n(" * 41 + b"U\x01xU\x06latin1tR" + b"U\x03hextR" * 40
    yield "doubled text", start + doubled + stop
    yield "many zeros", start + b"cbuiltins\nbytearray\n\x8a\x06" + b"\0" * 5 + b"\x01\x85R" + stop
    yield "escapes in a name", start + b"cposix\x1b]0;owned\x07\nsys\x1b[2Jtem\n)R" + stop
    yield "long name", start + b"cposix\n" + b"x" * 5_000_000 + b"\n)R" + stop
    yield "escapes in a key", start + b"}" + pickle.dumps(ESCAPES, 2)[2:-1] + b"Ns" + stop


def as_torch_file(bare: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """Return a ``torch.save`` file whose pickle is ``bare``, with further records by name."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", bare)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in records.items():
            archive.writestr(f"archive/data/{name}", content)
    return stream.getvalue()


def hostile_torch_files() -> Iterator[tuple[str, bytes]]:
    """Yield names and ``torch.save`` files that are small, run nothing, and cost much."""
    for name, bare in hostile_pickles():
        yield name, as_torch_file(bare)

    def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
        """``_rebuild_tensor_v2`` over a storage of one float."""
        place = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x01tQ"
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
        end = b"\x89ccollections\nOrderedDict\n)RtR."
        return b"\x80\x02" + rebuild + place + offset + size + stride + end

    one, huge = b"K\x01\x85", b"\x8a\x06" + b"\0" * 5 + b"\x01"
    storage = {"0": b"\0\0\x80?"}
    yield "huge shape", as_torch_file(tensor(huge + b"\x85", one), **storage)
    yield "expanded shape", as_torch_file(tensor(huge + b"\x85", b"K\x00\x85"), **storage)
    yield "stride beyond", as_torch_file(tensor(b"K\x02\x85", huge + b"\x85"), **storage)
    yield (
        "negative stride",
        as_torch_file(tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), **storage),
    )
    yield "offset beyond", as_torch_file(tensor(one, one, huge), **storage)
    yield "missing storage", as_torch_file(tensor(one, one))
    zeros = bytes(256 << 20)
    packed = as_torch_file(tensor(one, one), zipfile.ZIP_DEFLATED, **{"0": zeros})
    yield "compressed zeros", packed


# --- YAML


def hostile_yaml() -> Iterator[tuple[str, str]]:
    """Yield names and YAML texts that are small and cost much."""
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
    )
    yield "billion laughs", laughs
    merged = "a0: &a0 {k0: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 10)
    )
    yield "merged laughs", merged
    yield "many aliases", "a: &a 1\nb: [" + "*a, " * 5000 + "*a]\n"
    yield "alias of itself", "data: &a [*a]\n"
    yield "mapping of itself", "data: &a {b: *a}\n"
    yield "brackets", "data: " + "[" * 5000 + "]" * 5000 + "\n"
    yield "open brackets", "data: " + "[" * 5000 + "\n"
    yield "braces", "data: " + "{a: " * 5000 + "1" + "}" * 5000 + "\n"
    yield "dashes", "data:\n" + "- " * 5000 + "1\n"
    yield "question marks", "? " * 5000 + "1\n"
    yield "many nodes", "data: [" + "1, " * 300_000 + "1]\n"
    yield "many keys", "".join(f"k{n}: 1\n" for n in range(100_000))
    yield "many digits", "max_steps: " + "9" * 5000 + "\n"
    yield "many hexadecimal digits", "max_steps: 0x" + "f" * 10_000 + "\n"
    yield "sexagesimal", "max_steps: 1" + ":59" * 50_000 + "\n"
    yield "long text", "run_dir: " + "x" * 2_000_000 + "\n"
    yield "long key", "x" * 2_000_000 + ": 1\n"
    yield "escapes", '"\\e]0;owned\\a": "\\e[2J"\n'
    yield "escapes in a value", 'max_steps: "\\e[2J\\u202e"\n'
    yield "large", "# " + "x" * (8 << 20) + "\n"
    yield "object", "data: !!python/object/apply:os.system [id]\n"
    yield "set", "data: !!set {a, b}\n"
    yield "binary", "data: !!binary aGVsbG8=\n"
    yield "pairs", "data: !!pairs [a: 1, a: 2]\n"
    yield "duplicate key", "max_steps: 1\nmax_steps: 2\n"
    yield "nothing", "\0"
    yield "documents", "a: 1\n---\nb: 1\n"
