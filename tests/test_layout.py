"""Parallel layouts: the degrees, their names, and who is where, as Megatron has it."""

from __future__ import annotations

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.parallel import read_degrees
from nemo_megacpp.layout.placement import (
    EMBEDDING,
    GROUPS,
    degrees_of,
    group_facts,
    group_of,
    group_size,
)

L = ParallelLayout.parse


def test_defaults_are_one_rank() -> None:
    layout = ParallelLayout()
    assert layout.world == layout.model_parallel_size == layout.data_parallel_size == 1
    assert layout.etp == layout.chunks_count == 1
    assert layout.describe() == "TP=1 CP=1 EP=1 ETP=1 PP=1 (1 rank: DP=1, expert DP=1)"


def test_the_articles_example() -> None:
    layout = L("tp=2,etp=1")
    assert layout.describe() == "TP=2 SP CP=1 EP=1 ETP=1 PP=1 (2 ranks: DP=1, expert DP=2)"
    assert layout.short() == "tp=2,sp=true,etp=1"


@pytest.mark.parametrize(
    ("text", "world", "dp", "edp"),
    [
        ("tp=2,cp=2,pp=2", 8, 1, 2),
        ("tp=2,etp=1,ep=4", 4, 2, 1),  # the experts need more ranks than the dense layers
        ("tp=2,etp=3", 6, 3, 2),
        ("tp=2,ep=2,world=16", 16, 8, 4),
        ("pp=2,vpp=3,ep=2", 4, 2, 1),
    ],
)
def test_the_world_holds_dense_and_expert_layers(text: str, world: int, dp: int, edp: int) -> None:
    layout = L(text)
    assert (layout.world, layout.data_parallel_size, layout.expert_data_parallel_size) == (
        world,
        dp,
        edp,
    )


def test_a_world_that_does_not_divide_has_no_data_parallel_size() -> None:
    layout = L("tp=2,world=5")
    with pytest.raises(UserError, match="5 ranks is not divisible by TP x CP x PP = 2"):
        _ = layout.data_parallel_size
    with pytest.raises(UserError, match="5 ranks is not divisible by ETP x EP x PP = 2"):
        _ = layout.expert_data_parallel_size


def test_three_vocabularies_name_the_same_layout() -> None:
    megatron = (
        "tensor_model_parallel_size=2,context_parallel_size=2,pipeline_model_parallel_size=2,"
        "virtual_pipeline_model_parallel_size=2,expert_model_parallel_size=2,"
        "expert_tensor_parallel_size=1,sequence_parallel=true,world_size=16"
    )
    articles = (
        "tensor_parallel=2,context_parallel=2,pipeline_parallel=2,virtual_pipeline=2,"
        "expert_parallel=2,expert_tensor_parallel=1,sequence_parallel=yes,world=16"
    )
    short = "TP=2, cp=2, pp=2, vpp=2, ep=2, etp=1, sp=on, world=16"
    expected = ParallelLayout(2, True, 2, 2, 2, 2, 1, 16)
    assert L(megatron) == L(articles) == L(short) == expected
    yaml = {"tensor_parallel": 2, "sequence_parallel": False, "expert_tensor_parallel": None}
    assert ParallelLayout.from_mapping(yaml) == ParallelLayout(2, False)


@pytest.mark.parametrize(
    ("text", "sp"), [("tp=2", True), ("tp=1", False), ("cp=4", False), ("tp=2,sp=0", False)]
)
def test_sequence_parallel_follows_tp_unless_said(text: str, sp: bool) -> None:
    assert L(text).sp is sp


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(2),
        ParallelLayout(2, True),
        ParallelLayout(sequence_parallel=True),
        ParallelLayout(2, True, 2, 2, 2, 2, 2, 16),
        ParallelLayout(expert_tensor_parallel_size=1),
    ],
)
def test_short_reads_back(layout: ParallelLayout) -> None:
    assert L(layout.short()) == layout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpp=2", "Did you mean 'tp'"),
        ("tensor_paralel=2", "Did you mean 'tensor_parallel'"),
        ("dp=2", "follows from them"),
        ("tp=0", "tp must be a positive whole number; got '0'"),
        ("tp=two", "got 'two'"),
        ("tp=none", "positive whole number; got 'none'"),
        ("etp=1.5", "positive whole number or none; got '1.5'"),
        ("cp=-1", "got '-1'"),
        ("sp=maybe", "true or false"),
        ("tp=2,tp=2", "is given twice: tp=2 and tp=2. Give it once."),
        ("tp=2,tensor_parallel=4", "is given twice: tp=2 and tensor_parallel=4."),
        ("tp=2,", "'' in layout 'tp=2,' is not name=value"),
        ("tp=", "'tp=' in layout 'tp=' is not name=value"),
        ("tp", "not name=value"),
        ("", "not name=value"),
        ("tp=2,,cp=2", "not name=value"),
    ],
)
def test_unreadable_layouts_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        L(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "degrees", "changed"),
    [
        ("tp=2,etp=1", "cp=2", "tp=2,cp=2,etp=1"),
        ("tp=2,etp=1", "tp=4", "tp=4,etp=1"),
        ("tp=2,etp=1", "tp=1", "tp=1,etp=1"),
        ("tp=2,etp=1", "etp=none", "tp=2"),
        ("tp=2,sp=false", "tp=4", "tp=4,sp=false"),
        ("tp=2,sp=false", "tp=4,sp=true", "tp=4,sp=true"),
        ("tp=1", "tp=2", "tp=2,sp=true"),
        ("tp=1", "tp=2,sp=false", "tp=2,sp=false"),
        ("tp=2,world=8", "pp=2", "tp=2,pp=2,world=8"),
        ("tp=2,world=8", "world=none", "tp=2"),
        ("pp=4,vpp=2", "vpp=none", "pp=4"),
    ],
)
def test_degrees_are_laid_over_a_layout(layout: str, degrees: str, changed: str) -> None:
    assert L(layout).changed(read_degrees(degrees)) == L(changed)


def test_a_boolean_is_no_degree() -> None:
    with pytest.raises(UserError, match="tp must be a positive whole number; got True"):
        ParallelLayout.from_mapping({"tp": True})


# --- who is where

WORLDS = [
    "tp=1",
    "tp=2,cp=2,pp=2,world=16",
    "tp=2,etp=1,ep=4,world=8",
    "tp=4,etp=2,ep=2,pp=2,world=16",
    "tp=2,cp=3,ep=3,etp=2,world=12",
    "tp=1,ep=2,etp=2,pp=3,world=24",
]


def groups(layout: ParallelLayout, axis: str) -> list[list[int]]:
    """All groups of one kind, in the order of their first ranks."""
    return [
        list(ranks) for ranks in sorted({group_of(layout, r, axis) for r in range(layout.world)})
    ]


@pytest.mark.parametrize("text", WORLDS)
def test_groups_are_megatrons(text: str) -> None:
    state = pytest.importorskip("megatron.core.parallel_state")
    layout = L(text)
    order = "tp-cp-ep-dp-pp"
    dense = state.RankGenerator(
        tp=layout.tp, ep=1, dp=layout.data_parallel_size, pp=layout.pp, cp=layout.cp, order=order
    )
    expert = state.RankGenerator(
        tp=layout.etp, ep=layout.ep, dp=layout.expert_data_parallel_size, pp=layout.pp, cp=1,
        order=order,
    )  # fmt: skip
    for axis in ("tp", "cp", "dp", "pp"):
        assert groups(layout, axis) == dense.get_ranks(axis), axis
    for axis, name in (("etp", "tp"), ("ep", "ep"), ("edp", "dp"), ("pp", "pp")):
        assert groups(layout, axis) == expert.get_ranks(name), axis


@pytest.mark.parametrize("text", WORLDS)
def test_a_coordinate_is_the_place_in_the_group(text: str) -> None:
    layout = L(text)
    for axis in degrees_of(layout):
        for group in groups(layout, axis):
            places = [getattr(layout.rank_coordinates(rank), axis) for rank in group]
            assert places == list(range(len(group)))


def test_no_such_rank() -> None:
    layout = L("tp=2")
    for rank in (-1, 2):
        with pytest.raises(UserError, match="has 2 ranks"):
            layout.rank_coordinates(rank)


def test_groups_partition_the_world() -> None:
    layout = ParallelLayout.parse("tp=2,cp=2,ep=2,etp=1,pp=2,world=16")
    for group in GROUPS:
        members = {group_of(layout, rank, group) for rank in range(16)}
        assert sorted(rank for ranks in members for rank in ranks) == list(range(16))
        facts = group_facts(layout, group, gpus_per_node=4)
        assert (facts.groups, facts.size) == (len(members), group_size(layout, group))
        assert facts.nodes == max(len({rank // 4 for rank in ranks}) for ranks in members)


def test_the_embedding_group_is_the_first_and_the_last_stage() -> None:
    layout = ParallelLayout.parse("tp=2,pp=3")
    assert group_of(layout, 3, EMBEDDING) == (1, 5)
    assert [group_size(L(text), EMBEDDING) for text in ("pp=3", "pp=1")] == [2, 1]


def test_chunks_are_dealt_to_stages_in_turn() -> None:
    layout = L("pp=4,vpp=2")
    assert layout.chunks_count == 8
    assert [layout.chunk_index(1, v) for v in (0, 1)] == [1, 5]
