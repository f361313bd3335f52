"""A checkpoint knows its model, its tokenizer and its step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.checkpoint.identity import (
    FILE,
    read_identity,
    validate_same_model,
    write_identity,
)
from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.recipes.catalog import NAM56R_TINY_MODEL

TOKENIZER, OTHER_TOKENIZER = "a" * 64, "b" * 64


def saved(folder: Path, step: int = 20, **model: Any) -> Path:
    folder.mkdir(parents=True)
    identity = {"model": {**NAM56R_TINY_MODEL, **model}, "layout": "tp=2", "tokenizer": TOKENIZER}
    write_identity(folder, identity, step)
    return folder


def load(folder: Path, tokenizer: str | None = TOKENIZER, **changes: Any) -> None:
    model = {**NAM56R_TINY_MODEL, **changes}
    pattern = HybridPattern.parse(model["hybrid_pattern"], depth=model["num_layers"])
    validate_same_model(folder, model, pattern.letters, tokenizer)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "step=20", step=20)
    assert read_identity(folder) == {
        "model": NAM56R_TINY_MODEL,
        "layout": "tp=2",
        "tokenizer": TOKENIZER,
        "step": 20,
    }
    assert [path.name for path in folder.iterdir()] == [FILE]  # no partial file stays
    write_identity(folder, {"model": {}, "tokenizer": TOKENIZER}, 40)
    assert (read_identity(folder) or {})["step"] == 40


def test_a_checkpoint_from_elsewhere_has_none(tmp_path: Path) -> None:
    assert read_identity(tmp_path) is None
    load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"step": 3}', "\xff"])
def test_a_damaged_identity_is_refused(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "step=20")
    (folder / FILE).write_bytes(text.encode("latin-1"))
    for read in (read_identity, load):
        with pytest.raises(UserError, match=f"{FILE} (cannot be read|is damaged): "):
            read(folder)


# --- another model


def test_the_same_model_is_loaded(tmp_path: Path) -> None:
    load(saved(tmp_path / "c"))


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"mode": "nemo_native"}, {}),
        ({}, {"mode": "nemo_native"}),
        ({"qk_layernorm": False}, {}),
        ({}, {"m2rnn_conv_kernel": 4, "normalization": "RMSNorm"}),
    ],
)
def test_a_default_that_is_spelt_out_is_no_difference(
    there: dict[str, Any], here: dict[str, Any], tmp_path: Path
) -> None:
    load(saved(tmp_path / "c", **there), **here)


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_length": 512},
        {"moe_aux_loss_coeff": 0.0},
        {"m2rnn_state_gradient_clip": None},
        {"rotary_base": 500000},
        {"moe_token_dispatcher_type": "allgather"},
        {"ffn_hidden_size": 512},  # no F block
        {"hybrid_pattern": "AEMEAE|MEAEMR"},
        {"hybrid_pattern": "aeme aeme aemr"},
    ],
)
def test_what_may_change_between_runs(changes: dict[str, Any], tmp_path: Path) -> None:
    load(saved(tmp_path / "c"), **changes)


def test_sizes_of_experts_that_no_block_has_are_no_difference(tmp_path: Path) -> None:
    sizes = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    folder = saved(tmp_path / "c", hybrid_pattern="AMR", **dict.fromkeys(sizes))
    load(folder, hybrid_pattern="AMR")
    with pytest.raises(UserError, match="num_moe_experts is None there and 16 here"):
        load(folder, hybrid_pattern="AMRE")


def test_the_width_of_f_blocks_may_not(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", hybrid_pattern="AF")
    load(folder, hybrid_pattern="AF")
    with pytest.raises(UserError, match="ffn_hidden_size is 1184 there and 512 here"):
        load(folder, hybrid_pattern="AF", ffn_hidden_size=512)


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("hidden_size", 448),
        ("num_attention_heads", 56),
        ("num_query_groups", 2),
        ("kv_channels", 16),
        ("vocab_size", 300),
        ("num_moe_experts", 8),
        ("moe_ffn_hidden_size", 112),
        ("moe_shared_expert_intermediate_size", None),
        ("mamba_num_heads", 56),
        ("mamba_head_dim", 16),
        ("mamba_state_dim", 64),
        ("mamba_num_groups", 2),
        ("m2rnn_num_heads", 14),
        ("m2rnn_key_head_dim", 64),
        ("m2rnn_value_head_dim", 16),
        ("moe_router_enable_expert_bias", False),
    ],
)
def test_what_decides_a_tensor_may_not(name: str, here: object, tmp_path: Path) -> None:
    there = NAM56R_TINY_MODEL[name]
    with pytest.raises(UserError) as refusal:
        load(saved(tmp_path / "c"), **{name: here})
    assert str(refusal.value) == (
        f"{tmp_path / 'c'} is a checkpoint of another model: "
        f"{name} is {there} there and {here} here."
    )


@pytest.mark.parametrize(
    ("name", "default", "here"),
    [
        ("m2rnn_conv_kernel", 4, 3),
        ("normalization", "RMSNorm", "LayerNorm"),
        ("add_bias_linear", False, True),
        ("add_qkv_bias", False, True),
        ("qk_layernorm", False, True),
        ("gated_linear_unit", True, False),
        ("share_embeddings_and_output_weights", False, True),
    ],
)
def test_nor_may_what_the_recipes_leave_at_its_default(
    name: str, default: object, here: object, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{name} is {default} there and {here} here"):
        load(saved(tmp_path / "c"), **{name: here})


def test_every_difference_is_listed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    with pytest.raises(UserError) as refusal:
        load(folder, OTHER_TOKENIZER, hidden_size=448, num_layers=13, hybrid_pattern="AEMR")
    assert str(refusal.value) == (
        f"{folder} is a checkpoint of another model: num_layers is 12 there and 13 here; "
        f"hidden_size is 224 there and 448 here; "
        f"the pattern is AEMEAEMEAEMR there and AEMRAEMRAEMRA here; "
        f"its data was made with another tokenizer (aaaaaaaaaaaa there, bbbbbbbbbbbb here)."
    )


LANGUAGE = {"name": "language", "vocab_size": 6, "field": "lang"}
KIND = {"name": "kind", "vocab_size": 3, "field": "kind", "owner": [2]}


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (
            [LANGUAGE],
            None,
            r"language \(6 ids of field=lang, owner first, add\) there and none here",
        ),
        (None, [KIND], r"none there and kind \(3 ids of field=kind, owner \[2\], add\) here"),
        ([KIND], [{**KIND, "owner": [3]}], r"owner \[2\], add\) there and .*owner \[3\]"),
        ([KIND], [{**KIND, "vocab_size": 4}], r"3 ids .* \(4 ids"),
        ([LANGUAGE], [{**LANGUAGE, "field": "kind"}], r"field=lang.*field=kind"),
    ],
)
def test_other_side_channels_are_refused(there: Any, here: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the side channels are .*{said}"):
        load(saved(tmp_path / "c", side_channels=there), side_channels=here)


def test_side_channels_that_are_asked_for(tmp_path: Path) -> None:
    """How TP holds a table may change; with init_side_channels=any, channels may come and go."""
    folder = saved(tmp_path / "c", side_channels=[LANGUAGE])
    load(folder, side_channels=[{**LANGUAGE, "partition": "vocabulary", "owner": "first"}])
    model = {**NAM56R_TINY_MODEL, "side_channels": [KIND]}
    letters = HybridPattern.parse(model["hybrid_pattern"], depth=model["num_layers"]).letters
    validate_same_model(folder, model, letters, TOKENIZER, new_side_channels=True)
    model["side_channels"] = [{**LANGUAGE, "vocab_size": 7}]
    with pytest.raises(UserError, match=r"6 ids .* \(7 ids"):
        validate_same_model(folder, model, letters, TOKENIZER, new_side_channels=True)


def test_damaged_side_channels_are_refused(tmp_path: Path) -> None:
    for number, content in enumerate(([{"name": "../x", "vocab_size": 1, "ngram": 2}], "language")):
        with pytest.raises(UserError, match="is damaged: model: "):
            load(saved(tmp_path / str(number), side_channels=content))


def test_a_tokenizer_that_is_not_known_yet_is_not_compared(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    load(folder, tokenizer=None)
    with pytest.raises(UserError, match="another tokenizer"):
        load(folder, tokenizer=OTHER_TOKENIZER)


def test_the_file_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    text = (saved(tmp_path / "c") / FILE).read_text()
    assert json.loads(text)["model"]["hybrid_pattern"] == "AEMEAEMEAEMR"
    assert len(text.splitlines()) > 20
