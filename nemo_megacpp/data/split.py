"""Which documents train, which are held out, and which are left out by a size cap.

A hash of a document's key alone decides, so a document has the same split on every machine and
keeps it when other documents are added or removed (but for the last resort in `plan_split`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

from nemo_megacpp.data.corpus import Document
from nemo_megacpp.errors import UserError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

PLACE = np.dtype([("cap", np.uint64), ("split", np.uint64), ("size", np.int64)])
"""A document's two hashes, and the bytes of its text: 24 bytes a document."""

_END = 1 << 64


def check_held_out(share: float) -> None:
    """Raise a UserError for a share of documents that leaves nothing in one split."""
    if not 0 < share < 1:
        raise UserError(f"The held-out share is {share}; it must lie between 0 and 1.")


def _hash(key: str, purpose: bytes) -> int:
    """Return a number in [0, 2^64). Two purposes give independent numbers: a cap is unbiased."""
    digest = blake2b(key.encode(errors="surrogateescape"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class SplitPlan:
    """Three thresholds of hashes, and what they select.

    Attributes:
        held_out_below, kept_below, tokenizer_below: thresholds.
        documents, bytes: of each split.
        tokenizer_bytes: of the text that a BPE is trained on.
    """

    held_out_below: int
    kept_below: int
    tokenizer_below: int
    documents: dict[Split, int]
    bytes: dict[Split, int]
    tokenizer_bytes: int

    def split(self, key: str) -> Split | None:
        """Return the document's split, or None where the size cap leaves it out."""
        if _hash(key, b"cap") >= self.kept_below:
            return None
        return "heldout" if _hash(key, b"split") < self.held_out_below else "train"

    def trains_tokenizer(self, key: str) -> bool:
        """Return whether a BPE is trained on the document: never on a held-out one."""
        return _hash(key, b"cap") < self.tokenizer_below and self.split(key) == "train"


def hash_documents(documents: Iterable[Document]) -> np.ndarray:
    """Read documents and return their `PLACE`, ``[documents]``; nothing else is held in memory."""
    return np.fromiter(
        ((_hash(d.key, b"cap"), _hash(d.key, b"split"), d.size) for d in documents), PLACE
    )


def plan_split(
    places: np.ndarray,
    *,
    held_out: float,
    max_bytes: int | None = None,
    tokenizer_bytes: int,
) -> SplitPlan:
    """Plan the split.

    Where the hashes put every document into one split, the one nearest to the threshold changes.

    Args:
        places: of all documents, `PLACE`, ``[documents]``.
        held_out: share of documents to hold out, between 0 and 1.
        max_bytes: use no more text than this, taking documents in the order of their hashes.
        tokenizer_bytes: train a BPE on no more text than this.

    Raises:
        UserError: fewer than two documents, in all or under the cap.
    """
    cap, place, size = places["cap"], places["split"], places["size"]
    if len(size) < 2:
        raise UserError(
            f"{len(size)} document(s) of text found; at least 2 are needed, one to train on and "
            "one to hold out."
        )
    kept_below = _END if max_bytes is None else _below(cap, size, max_bytes)
    kept = cap <= np.uint64(kept_below - 1) if kept_below else np.zeros(len(cap), bool)
    if kept.sum() < 2:
        raise UserError(
            f"A cap of {max_bytes:,} bytes keeps {kept.sum()} of {len(size)} documents "
            f"({size.sum():,} bytes in all); at least 2 are needed."
        )
    lowest, highest = int(place[kept].min()), int(place[kept].max())
    if lowest == highest:
        raise UserError(
            "All documents have the same path below their roots, so none can be held out; "
            "name a folder that holds them all."
        )
    threshold = min(max(round(held_out * _END), lowest + 1), highest)
    held = kept & (place < np.uint64(threshold))
    train = kept & ~held
    tokenizer_below = max(
        _below(cap[train], size[train], tokenizer_bytes), int(cap[train].min()) + 1
    )
    shown = train & (cap <= np.uint64(tokenizer_below - 1))
    return SplitPlan(
        held_out_below=threshold,
        kept_below=kept_below,
        tokenizer_below=tokenizer_below,
        documents={"train": int(train.sum()), "heldout": int(held.sum())},
        bytes={"train": int(size[train].sum()), "heldout": int(size[held].sum())},
        tokenizer_bytes=int(size[shown].sum()),
    )


def _below(cap: np.ndarray, size: np.ndarray, limit: int) -> int:
    """Return the threshold below which documents sum to at most ``limit`` bytes."""
    order = np.argsort(cap, kind="stable")
    fit = int(np.searchsorted(np.cumsum(size[order]), limit, side="right"))
    return _END if fit == len(order) else int(cap[order[fit]])
