"""Which documents train, which are held out, and which are left out by a size cap.

Each document's place follows from a hash of its key alone, so it is the same on every machine and
does not move when other documents come or go (but for the last resort in `plan_split`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

from nemo_megacpp.data.corpus import Document
from nemo_megacpp.errors import UserError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

_END = 1 << 64


def check_held_out(share: float) -> None:
    """Refuse a share of documents to hold out that leaves nothing on one side."""
    if not 0 < share < 1:
        raise UserError(f"The held-out share is {share}; it must lie between 0 and 1.")


def _place(key: str, purpose: bytes) -> int:
    """Return a number in [0, 2^64). Two purposes give independent numbers: a cap is unbiased."""
    digest = blake2b(key.encode(errors="surrogateescape"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class SplitPlan:
    """Three thresholds in hash space, and what they select."""

    held_out_below: int
    kept_below: int
    tokenizer_below: int
    documents: dict[Split, int]
    bytes: dict[Split, int]
    tokenizer_bytes: int

    def split(self, key: str) -> Split | None:
        """Return the document's split, or None where the size cap leaves it out."""
        if _place(key, b"cap") >= self.kept_below:
            return None
        return "heldout" if _place(key, b"split") < self.held_out_below else "train"

    def trains_tokenizer(self, key: str) -> bool:
        """Return whether a BPE may see the document: never a held-out one."""
        return _place(key, b"cap") < self.tokenizer_below and self.split(key) == "train"


@dataclass(frozen=True)
class Places:
    """The places of documents in hash space, and their sizes: 24 bytes a document.

    Attributes:
        caps, splits: ``[documents]``, uint64.
        sizes: bytes of text, ``[documents]``, int64.
    """

    caps: np.ndarray
    splits: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Places:
        """Read documents, keeping nothing else of them."""
        caps, splits, sizes = [], [], []
        for document in documents:
            caps.append(_place(document.key, b"cap"))
            splits.append(_place(document.key, b"split"))
            sizes.append(document.size)
        return cls(
            np.array(caps, np.uint64), np.array(splits, np.uint64), np.array(sizes, np.int64)
        )

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """Return the places of all parts, in their order."""
        return cls(
            np.concatenate([part.caps for part in parts]),
            np.concatenate([part.splits for part in parts]),
            np.concatenate([part.sizes for part in parts]),
        )


def plan_split(
    documents: Places,
    *,
    held_out: float,
    max_bytes: int | None = None,
    tokenizer_bytes: int,
) -> SplitPlan:
    """Plan the split.

    Where chance puts every document on one side, the one nearest to the threshold changes sides.

    Args:
        documents: All documents.
        held_out: The share of documents to hold out, between 0 and 1.
        max_bytes: Keep no more text than this, taking documents in hash order.
        tokenizer_bytes: Show a BPE trainer about this much of the training text, at most.

    Raises:
        UserError: Fewer than two documents, in all or under the cap.
    """
    cap, place, size = documents.caps, documents.splits, documents.sizes
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
    """Return the threshold under which documents, in hash order, sum to at most ``limit``."""
    order = np.argsort(cap, kind="stable")
    fit = int(np.searchsorted(np.cumsum(size[order]), limit, side="right"))
    return _END if fit == len(order) else int(cap[order[fit]])
