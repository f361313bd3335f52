"""The declaration of side channels."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ModelShape, ParallelLayout, check_layout
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.side_channels import channels_at, read_side_channels, side_channel_violations

LANGUAGE = {"name": "language", "vocab_size": 6, "field": "lang"}


def test_read() -> None:
    bigram = {"name": "bigram", "vocab_size": 64, "ngram": 2, "owner": [1, 3]}
    everywhere = {"name": "kind", "vocab_size": 3, "field": "kind", "owner": "all"}
    language, two, all_ = channels = read_side_channels([LANGUAGE, bigram, everywhere])
    assert (language.owner, language.partition, language.combine) == ("first", "replicated", "add")
    assert (language.source, two.source, two.key) == (
        "field=lang",
        "ngram=2",
        "side_channel.bigram",
    )
    assert channels_at(channels, None) == (language,)
    assert channels_at(channels, 1) == (two, all_)
    assert channels_at(channels, 2) == (all_,)
    assert read_side_channels(None) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Language"}, "must be lower-case letters"),
        ({"name": "../x"}, "must be lower-case letters"),
        ({"vocab": 3}, "has no setting 'vocab'. Did you mean 'vocab_size'"),
        ({"vocab_size": 0}, "vocab_size: 0 must be at least 1"),
        ({"vocab_size": "six"}, "vocab_size: 'six' is not a whole number"),
        ({"ngram": 2}, "give either field"),
        ({"field": None}, "give either field"),
        ({"owner": "last"}, "'last' is not 'first' or 'all' or a list"),
        ({"owner": [2, 1]}, "in ascending order"),
        ({"owner": []}, "must be numbers of layers"),
        ({"owner": [1, 4]}, r"names layers \[4\], and the model has layers 0 to 3"),
        ({"partition": "rows"}, "'rows' is not 'replicated' or 'vocabulary'"),
        ({"width": 8}, "with combine=add: what is added has the hidden size"),
    ],
)
def test_refusals(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        HybridConfig(**tiny_model("AMER", side_channels=[{**LANGUAGE, **changes}]))


def test_every_violation_is_listed() -> None:
    declared = [LANGUAGE, LANGUAGE, {"name": "x", "vocab_size": 0}, {"name": "y"}]
    found = list(side_channel_violations(declared, 4))
    assert len(found) == 3
    assert any("two channels are named 'language'" in message for message in found)


def test_rows_that_tp_splits() -> None:
    shape = ModelShape(
        HybridPattern.parse("R"),
        48,
        m2rnn_num_heads=12,
        vocab_size=128,
        side_channels=[{**LANGUAGE, "partition": "vocabulary"}],
    )
    assert not check_layout(ParallelLayout.parse("tp=2"), shape)
    (found,) = check_layout(ParallelLayout.parse("tp=4"), shape)
    assert "language: vocab_size = 6 is not divisible by TP = 4" in str(found)
    assert "tp=2" in found.legal


def test_a_recipe_declares_them() -> None:
    text = "side_channels=[{name: language, vocab_size: 6, field: lang, owner: [0, 2]}]"
    recipe = resolve("nam56r_tiny", [text])
    assert resolve("nam56r_tiny", [text]).to_mapping() == recipe.to_mapping()
    (channel,) = read_side_channels(recipe.model["side_channels"])
    assert channel.owner == (0, 2)
