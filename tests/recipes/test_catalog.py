"""The catalogue: NAM56R as published, and a tiny one of the same proportions."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.preflight.model_checks import validate_model, validate_recipe_layout
from nemo_megacpp.recipes.catalog import CATALOG, NAM56R_MODEL, NAM56R_TINY_MODEL
from nemo_megacpp.recipes.recipe import Recipe, resolve

BOTH = (NAM56R_MODEL, NAM56R_TINY_MODEL)


def test_nam56r_is_the_published_model() -> None:
    published = {
        "hidden_size": 3584,
        "ffn_hidden_size": 18944,
        "num_attention_heads": 56,
        "num_query_groups": 8,
        "kv_channels": 64,
        "vocab_size": 65536,
        "seq_length": 4096,
        "rotary_base": 500000,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 896,
        "moe_shared_expert_intermediate_size": 1024,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "mamba_num_heads": 56,
        "mamba_head_dim": 64,
        "mamba_state_dim": 64,
        "mamba_num_groups": 8,
    }
    assert {name: NAM56R_MODEL[name] for name in published} == published


def test_nam56r_counts_its_families() -> None:
    pattern = resolve("nam56r").pattern
    assert len(pattern) == 52
    assert pattern.counts() == {
        Family.ATTENTION: 13,
        Family.MAMBA: 13,
        Family.EXPERT: 22,
        Family.RECURRENT: 4,
        Family.FEED_FORWARD: 0,
    }
    for stage in pattern.chunks(4):
        assert [pattern.families[layer] for layer in stage].count(Family.RECURRENT) == 1


def test_nam52_is_nam56r_with_experts_for_its_recurrent_tail() -> None:
    pattern, sibling = resolve("nam52").pattern, resolve("nam56r").pattern
    assert pattern.letters == sibling.letters.replace("R", "E")
    assert pattern.counts() == {
        Family.ATTENTION: 13,
        Family.MAMBA: 13,
        Family.EXPERT: 26,
        Family.RECURRENT: 0,
        Family.FEED_FORWARD: 0,
    }
    model = {**resolve("nam52").model, "hybrid_pattern": NAM56R_MODEL["hybrid_pattern"]}
    assert model == NAM56R_MODEL


def test_tiny_is_one_whole_unit() -> None:
    pattern = resolve("nam56r_tiny").pattern
    assert str(pattern) == NAM56R_MODEL["hybrid_pattern"] == "AEMEAEMEAEMR"
    assert pattern.counts() == {
        Family.ATTENTION: 3,
        Family.MAMBA: 3,
        Family.EXPERT: 5,
        Family.RECURRENT: 1,
        Family.FEED_FORWARD: 0,
    }


@pytest.mark.parametrize("model", BOTH, ids=["nam56r", "nam56r_tiny"])
def test_the_proportions_of_the_family(model: dict[str, int]) -> None:
    hidden = model["hidden_size"]
    assert model["num_attention_heads"] == 7 * model["num_query_groups"]
    assert model["num_attention_heads"] * model["kv_channels"] == hidden
    assert model["mamba_num_heads"] == 7 * model["mamba_num_groups"]
    assert model["mamba_num_heads"] * model["mamba_head_dim"] == hidden
    assert model["m2rnn_num_heads"] * model["m2rnn_value_head_dim"] == hidden
    assert model["m2rnn_key_head_dim"] == 4 * model["m2rnn_value_head_dim"]
    assert 4 * model["moe_ffn_hidden_size"] == hidden
    assert 7 * model["moe_shared_expert_intermediate_size"] == 2 * hidden
    assert 7 * model["ffn_hidden_size"] == 37 * hidden


def test_tiny_differs_from_nam56r_in_sizes_alone() -> None:
    assert NAM56R_TINY_MODEL.keys() == NAM56R_MODEL.keys()
    routing = {name for name in NAM56R_MODEL if name.startswith("moe_") and "size" not in name}
    same = {"hybrid_pattern", "num_moe_experts", *routing}
    assert len(routing) == 7
    for name in same:
        assert NAM56R_TINY_MODEL[name] == NAM56R_MODEL[name], name


def test_the_layout_of_both_is_the_articles_example() -> None:
    for name in CATALOG:
        layout = resolve(name).layout
        assert layout == ParallelLayout.parse("tp=2,sp=true,etp=1")
        assert layout.world == 2


@pytest.mark.parametrize("name", CATALOG)
def test_named_recipes_are_legal_as_they_are(name: str) -> None:
    recipe = resolve(name)
    validate_recipe_layout(recipe)
    validate_model(recipe)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("nam56r_tiny", ("tp=1",)),
        ("nam56r_tiny", ("tp=1", "pp=2")),
        ("nam56r_tiny", ("tp=4", "ep=4", "cp=1")),
        ("nam56r_tiny", ("tp=2", "cp=2", "etp=2")),
        ("nam56r_tiny", ("tp=1", "pp=2", "vpp=3")),
        ("nam56r", ("tp=8", "ep=8")),
        ("nam56r", ("tp=4", "pp=4")),
        ("nam56r", ("tp=1", "ep=16", "world=16")),
    ],
)
def test_both_can_be_laid_out_otherwise(name: str, overrides: tuple[str, ...]) -> None:
    recipe = resolve(name, overrides)
    validate_recipe_layout(recipe)
    validate_model(recipe)


def test_the_query_ratio_survives_on_each_rank() -> None:
    recipe: Recipe = resolve("nam56r", ["tp=8"])
    validate_recipe_layout(recipe)
    heads, groups = recipe.model["num_attention_heads"], recipe.model["num_query_groups"]
    assert (heads // recipe.layout.tp, groups // recipe.layout.tp) == (7, 1)


def test_catalogue_entries_cannot_be_changed_through_a_recipe() -> None:
    before = dict(NAM56R_TINY_MODEL)
    recipe = resolve("nam56r_tiny")
    recipe.model["hidden_size"] = 1
    assert before == NAM56R_TINY_MODEL
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.training.lr = 1.0  # type: ignore[misc]
    assert HybridPattern.parse("AEMEAEMEAEMR") == resolve("nam56r_tiny").pattern
