"""Train on the output of Megatron's ``preprocess_data.py``, without copying it.

The new folder has the tokenizer, an index for each split, and links to the existing ``.bin``.
Every token is read once: with TP, Megatron embeds an id beyond the vocabulary as zeros and reports
no error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_megacpp.data.checksums import bytes_to_read, write_checksums
from nemo_megacpp.data.indexed import IndexedTokens, write_index
from nemo_megacpp.data.prepared import PreparedData, Request, SplitCounts, file_state, reusable
from nemo_megacpp.data.split import SPLITS, Split, check_held_out
from nemo_megacpp.data.staging import bars, staging
from nemo_megacpp.data.tokenizer import LoadedTokenizer, copy_tokenizer, load_tokenizer
from nemo_megacpp.errors import UserError

_PIECE = 1 << 24
"""Tokens that are read at a time."""
_SEED = 1234


def adopt(
    prefix: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str],
    held_out: float = 0.05,
    held_out_prefix: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PreparedData:
    """Make a folder of prepared data over Megatron's ``prefix.bin`` and ``prefix.idx``.

    Args:
        prefix: path of both files without their suffix, Megatron's ``--data-path``.
        out: the folder to make.
        tokenizer: folder of the Hugging Face tokenizer that made them.
        held_out: share of documents to hold out, chosen by their number.
        held_out_prefix: files to hold out instead; all of ``prefix`` is then for training.
        overwrite: replace prepared data in ``out``.
        progress: draw bars on standard error.

    Raises:
        UserError: files that are missing, damaged or of another tokenizer, documents that do not
            end in its end token, or an ``out`` that cannot be written or holds something else.
    """
    out = Path(out)
    check_held_out(held_out)
    loaded = load_tokenizer(tokenizer)
    # A user may name one of the two files as well.
    paths = [Path(name) for name in (prefix, held_out_prefix) if name is not None]
    prefixes = [
        str((path.with_suffix("") if path.suffix in (".bin", ".idx") else path).absolute())
        for path in paths
    ]
    sources = [IndexedTokens.open(name) for name in prefixes]
    request: Request = {
        "adopted": [file_state(source.path) for source in sources],
        "tokenizer": loaded.fingerprint,
        "held_out": held_out if held_out_prefix is None else None,
    }
    existing = reusable(out, request, overwrite)
    if existing is not None:
        return existing
    with bars(progress) as drawn:
        task = drawn.add_task("checking", total=sum(s.path.stat().st_size for s in sources))
        ends = [_check(source, loaded, lambda n: drawn.advance(task, n)) for source in sources]
    chosen = _choose(sources, held_out)
    lengths = np.concatenate([source.lengths for source in sources])
    # An end token inside a text starts a new document in packed rows, whatever the lengths are.
    multiple = int(np.gcd.reduce(lengths)) if sum(ends) == len(lengths) else 1
    with staging(out, request) as stage:
        for split, (source, numbers) in chosen.items():
            index = stage.whole / f"{split}.idx"
            write_index(index, source.dtype, source.lengths[numbers], source.offsets[numbers])
            index.with_suffix(".bin").symlink_to(source.path)
        copy_tokenizer(Path(tokenizer), stage.whole / "tokenizer")
        PreparedData(
            root=out,
            vocab_size=loaded.vocab_size,
            eos_id=loaded.eos_id,
            tokenizer_fingerprint=loaded.fingerprint,
            splits={
                split: SplitCounts(
                    documents=len(numbers),
                    tokens=int(source.lengths[numbers].sum(dtype=np.int64)),
                    bytes=None,
                )
                for split, (source, numbers) in chosen.items()
            },
            skipped={},
            source={"adopted": prefixes},
            request=request,
            document_multiple=multiple,
        ).write_manifest(stage.whole)
        with bars(progress) as drawn:
            task = drawn.add_task("checksums", total=bytes_to_read(stage.whole))
            write_checksums(stage.whole, lambda n: drawn.advance(task, n))
    return PreparedData.open(out)


def _check(source: IndexedTokens, loaded: LoadedTokenizer, advance: Callable[[int], None]) -> int:
    """Read every token, and return the number of end tokens.

    Raises:
        UserError: no documents, an id beyond the vocabulary, an empty document, or one without an
            end token.
    """
    if not len(source.lengths):
        raise UserError(f"{source.path} has no documents.")
    if not source.lengths.all():
        raise UserError(f"{source.path} has a document without tokens.")
    ids = np.memmap(source.path, source.dtype, "r")
    found = 0
    for start in range(0, len(ids), _PIECE):
        piece = ids[start : start + _PIECE]
        lowest, highest = int(piece.min()), int(piece.max())
        if lowest < 0 or highest >= loaded.vocab_size:
            raise UserError(
                f"{source.path} has token id {lowest if lowest < 0 else highest}, but the "
                f"tokenizer has {loaded.vocab_size} tokens: another tokenizer made it."
            )
        found += int((piece == loaded.eos_id).sum())
        advance(piece.nbytes)
    last = source.offsets // np.dtype(source.dtype).itemsize + source.lengths - 1
    (without,) = np.nonzero(ids[last] != loaded.eos_id)
    if len(without):
        raise UserError(
            f"{len(without):,} of the {len(last):,} documents of {source.path}, first number "
            f"{without[0]:,}, do not end in the tokenizer's end token {loaded.eos_id}: they were "
            f"made with another tokenizer, or without preprocess_data.py's --append-eod."
        )
    return found


def _choose(
    sources: list[IndexedTokens], held_out: float
) -> dict[Split, tuple[IndexedTokens, np.ndarray]]:
    """Return the file of each split, and the numbers of its documents there."""
    if len(sources) == 2:
        pairs = zip(SPLITS, sources, strict=True)
        return {split: (source, np.arange(len(source.lengths))) for split, source in pairs}
    (source,) = sources
    if len(source.lengths) < 2:
        raise UserError(
            f"{source.path} has {len(source.lengths)} document; at least 2 are needed, one to "
            f"train on and one to hold out."
        )
    # Its number alone decides a document's split, so appended documents change no other's.
    places = np.random.default_rng(_SEED).random(len(source.lengths))
    held = places < np.clip(held_out, np.nextafter(places.min(), 1), places.max())
    return {"train": (source, np.flatnonzero(~held)), "heldout": (source, np.flatnonzero(held))}
