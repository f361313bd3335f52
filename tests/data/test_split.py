from __future__ import annotations

import numpy as np
import pytest

from nemo_megacpp.data.corpus import Document
from nemo_megacpp.data.split import SplitPlan, hash_documents, plan_split
from nemo_megacpp.errors import UserError

KEYS = [f"folder/file{i}.h" for i in range(2000)]


def plan(keys: list[str], **options) -> SplitPlan:
    documents = [Document(key, "x" * 10, 10) for key in keys]
    half = len(documents) // 2  # surveyed in two shards
    places = np.concatenate([hash_documents(documents[:half]), hash_documents(documents[half:])])
    return plan_split(places, **{"held_out": 0.05, "tokenizer_bytes": 10**9} | options)


def sides(keys: list[str], **options) -> dict[str, str | None]:
    made = plan(keys, **options)
    return {key: made.split(key) for key in keys}


def test_share_counts_and_independence_of_the_other_documents() -> None:
    whole = sides(KEYS)
    held = [key for key in KEYS if whole[key] == "heldout"]
    # 2000 draws at 5%: 100 with a standard deviation of 9.7; the hash is fixed, so this is stable.
    assert 70 <= len(held) <= 130
    made = plan(KEYS)
    assert made.documents == {"train": 2000 - len(held), "heldout": len(held)}
    assert made.bytes == {"train": 10 * (2000 - len(held)), "heldout": 10 * len(held)}
    half = sides(KEYS[::-2])
    assert half == {key: whole[key] for key in half}


def test_split_is_the_same_in_every_release() -> None:
    """A change of hash would put held-out text of old checkpoints into their training data."""
    held = [key for key, side in sides(KEYS[:100]).items() if side == "heldout"]
    assert held == [
        "folder/file5.h",
        "folder/file18.h",
        "folder/file22.h",
        "folder/file45.h",
        "folder/file75.h",
    ]


def test_cap_takes_whole_documents_without_moving_any() -> None:
    whole, capped = sides(KEYS), sides(KEYS, max_bytes=5005)
    kept = [key for key in KEYS if capped[key] is not None]
    assert len(kept) == 500
    assert all(capped[key] == whole[key] for key in kept)
    wider = sides(KEYS, max_bytes=8000)
    assert all(wider[key] is not None for key in kept)
    # The cap must not prefer one side: 500 draws at 5% are 25 with a standard deviation of 4.9.
    assert 10 <= sum(capped[key] == "heldout" for key in kept) <= 40


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_each_side_gets_a_document(held_out: float) -> None:
    for count in (2, 3, 7):
        made = plan(KEYS[:count], held_out=held_out)
        assert min(made.documents.values()) == 1
        assert sum(made.documents.values()) == count
        got = [made.split(key) for key in KEYS[:count]]
        assert (got.count("train"), got.count("heldout")) == tuple(made.documents.values())


def test_tokenizer_sees_a_bounded_part_of_the_training_text_only() -> None:
    made = plan(KEYS, held_out=0.5, tokenizer_bytes=3000)
    shown = [key for key in KEYS if made.trains_tokenizer(key)]
    assert len(shown) == 300
    assert made.tokenizer_bytes == 3000
    assert all(made.split(key) == "train" for key in shown)


def test_too_few_documents() -> None:
    with pytest.raises(UserError, match=r"1 document\(s\) of text found; at least 2"):
        plan(KEYS[:1])
    with pytest.raises(UserError, match="cap of 19 bytes keeps 1 of 2000 documents"):
        plan(KEYS, max_bytes=19)
    with pytest.raises(UserError, match="same path below their roots"):
        plan(["a", "a"])
