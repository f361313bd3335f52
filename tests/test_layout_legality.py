"""Legality: every reason why a layout is illegal, at once, with choices that do repair it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import (
    LayoutViolation,
    ModelShape,
    ParallelLayout,
    check_layout,
    padded_vocab_size,
    validate_layout,
)
from nemo_megacpp.pattern import HybridPattern

NAM56R_PATTERN = HybridPattern.parse("AEMEAEMEAEMR", depth=52)


@dataclass(frozen=True)
class Shape:
    """NAM56R; the batch is one that any small layout divides."""

    pattern: HybridPattern = NAM56R_PATTERN
    num_attention_heads: int | None = 56
    num_query_groups: int | None = 8
    mamba_num_heads: int | None = 56
    mamba_num_groups: int | None = 8
    m2rnn_num_heads: int | None = 56
    num_moe_experts: int | None = 16
    moe_ffn_hidden_size: int | None = 896
    moe_shared_expert_intermediate_size: int | None = 1024
    ffn_hidden_size: int | None = 18944
    vocab_size: int = 65536
    make_vocab_size_divisible_by: int | None = 128
    side_channels: list[dict[str, Any]] | None = None
    seq_length: int | None = 4096
    micro_batch_size: int | None = 1
    global_batch_size: int | None = 256
    cp_comm_type: str | None = None


NAM56R = Shape()
L = ParallelLayout.parse


def rules(violations: list[LayoutViolation]) -> set[str]:
    return {violation.rule for violation in violations}


def one(
    layout: str, shape: ModelShape = NAM56R, gpus_per_node: int | None = None
) -> LayoutViolation:
    (violation,) = check_layout(L(layout), shape, gpus_per_node=gpus_per_node)
    return violation


def only(letters: str, **sizes: Any) -> Shape:
    return replace(NAM56R, pattern=HybridPattern.parse(letters), **sizes)


# --- NAM56R


@pytest.mark.parametrize(
    "text",
    [
        "tp=1",
        "tp=2",
        "tp=2,etp=1",
        "tp=8,cp=1",
        "tp=4,cp=2",
        "tp=1,cp=8",
        "tp=8,cp=7,etp=1",
        "pp=4",
        "pp=2,vpp=2",
        "pp=13,vpp=2,world=13",
        "tp=2,ep=16,etp=1",
    ],
)
def test_legal_layouts_of_nam56r(text: str) -> None:
    shape = NAM56R
    layout = L(text)
    batch = 256 * layout.data_parallel_size * layout.pp
    shape = replace(shape, global_batch_size=batch, seq_length=4096 * 7)
    assert check_layout(layout, shape) == []
    validate_layout(layout, shape)


def test_tp16_breaks_every_head_count_at_once() -> None:
    violations = check_layout(L("tp=16,etp=1"), NAM56R)
    assert rules(violations) == {
        "attention-heads",
        "query-groups",
        "mamba-heads",
        "mamba-groups",
        "recurrent-heads",
    }
    for violation in violations:
        assert violation.legal == ("tp=1", "tp=2", "tp=4", "tp=8")
    groups = next(v for v in violations if v.rule == "query-groups")
    assert "num_query_groups = 8 is not divisible by TP = 16" in groups.message


def test_pp8_is_refused_not_rounded() -> None:
    violation = one("pp=8")
    assert violation.axis == "PP"
    assert "52 layers cannot be divided into 8" in violation.message
    assert violation.legal == ("pp=1", "pp=2", "pp=4", "pp=13")


@pytest.mark.parametrize(
    ("text", "numbers", "legal"),
    [
        ("tp=8,cp=2", "TP x CP = 8 x 2 = 16", ("cp=1", "tp=1", "tp=2", "tp=4")),
        ("tp=4,cp=4", "TP x CP = 4 x 4 = 16", ("cp=1", "cp=2", "tp=1", "tp=2")),
    ],
)
def test_mamba_heads_under_tp_and_cp(text: str, numbers: str, legal: tuple[str, ...]) -> None:
    violation = one(text)
    assert violation.rule == "mamba-heads-cp"
    assert f"mamba_num_heads = 56 is not divisible by {numbers}" in violation.message
    assert violation.legal == legal
    for heads in (64, 112):
        assert check_layout(L(text), replace(NAM56R, mamba_num_heads=heads)) == []


def test_an_axis_is_advised_for_itself_while_others_are_broken_too() -> None:
    violations = check_layout(L("tp=16,cp=5,pp=8,ep=3,etp=1"), NAM56R)
    legal = {violation.axis: violation.legal for violation in violations}
    assert legal["TP"] == ("tp=1", "tp=2", "tp=4", "tp=8")
    assert legal["EP"] == ("ep=1", "ep=2", "ep=4", "ep=8", "ep=16")
    assert legal["PP"] == ("pp=1", "pp=2", "pp=4", "pp=13")
    assert "cp=1" in legal["CP"]


def test_choices_respect_the_other_axes_where_they_can() -> None:
    violations = check_layout(L("tp=16,cp=2"), NAM56R)
    heads = next(violation for violation in violations if violation.rule == "attention-heads")
    assert heads.legal == ("tp=1", "tp=2", "tp=4")  # 8 divides the heads, but not with CP = 2


def test_unrelated_violations_are_all_reported() -> None:
    layout = ParallelLayout(
        tensor_model_parallel_size=3,
        context_parallel_size=5,
        pipeline_model_parallel_size=8,
        expert_model_parallel_size=5,
        expert_tensor_parallel_size=6,
        world_size=100,
    )
    expected = {
        "world-dense", "world-expert", "attention-heads", "query-groups", "mamba-heads",
        "mamba-groups", "recurrent-heads", "experts", "expert-ffn", "shared-expert-ffn",
        "mamba-heads-cp", "experts-need-sp", "sequence-zigzag", "depth",
    }  # fmt: skip
    assert rules(check_layout(layout, NAM56R)) == expected
    with pytest.raises(UserError) as caught:
        validate_layout(layout, NAM56R)
    message = str(caught.value)
    assert message.startswith(
        "Layout tp=3,sp=false,cp=5,pp=8,ep=5,etp=6,world=100 is illegal for this model of 52 "
        "layers, for 14 reasons:\n  1. "
    )
    assert [line.split(".")[0] for line in message.splitlines()[1:]] == [
        f"  {number}" for number in range(1, 15)
    ]


# --- rule by rule

CASES: list[tuple[str, Shape, str, str, tuple[str, ...]]] = [
    # layout, shape, rule, numbers, legal choices that must be among those offered
    ("tp=3", only("A"), "attention-heads", "56 is not divisible by TP = 3", ("tp=2", "tp=4")),
    ("tp=7,sp=0", only("A"), "query-groups", "8 is not divisible by TP = 7", ("tp=4", "tp=8")),
    ("tp=16", only("A", num_attention_heads=64), "query-groups", "8 is", ("tp=8",)),
    ("tp=4", only("M", mamba_num_heads=6, mamba_num_groups=1), "mamba-heads", "6 is", ("tp=1",)),
    ("tp=4", only("M", mamba_num_groups=2), "mamba-groups", "2 is", ("tp=1", "tp=2")),
    ("tp=1", only("M", mamba_num_groups=6), "mamba-heads-per-group", "56 is", (
        "mamba_num_groups=7",)),
    ("cp=3", only("M", mamba_num_heads=24, mamba_num_groups=4, seq_length=48),
     "mamba-groups-cp", "leaves 4 groups a rank, which CP = 3", ("cp=2", "cp=4", "tp=4")),
    ("tp=4", only("R", m2rnn_num_heads=6), "recurrent-heads", "6 is", ("tp=1", "tp=2")),
    ("ep=3", only("E"), "experts", "16 is not divisible by EP = 3", ("ep=2", "ep=4")),
    ("etp=5", only("E"), "expert-ffn", "896 is not divisible by ETP = 5", ("etp=4", "etp=7")),
    ("tp=4,etp=1", only("E", moe_shared_expert_intermediate_size=6), "shared-expert-ffn", "6 is",
     ("tp=1", "tp=2")),
    ("tp=8", only("F", ffn_hidden_size=12), "ffn", "12 is not divisible by TP = 8",
     ("tp=2", "tp=4")),
    ("tp=2,sp=false", only("E"), "experts-need-sp", "TP = 2", ("sp=true",)),
    ("sp=true", only("A"), "sp-without-tp", "TP is 1", ("sp=false",)),
    ("ep=2", only("A", num_moe_experts=None), "no-experts", "EP = 2", ("ep=1",)),
    ("cp=4", only("A", seq_length=20), "sequence-zigzag", "20 is not divisible by 2 x CP = 8",
     ("seq_length=16", "seq_length=24", "cp=1", "cp=2")),
    ("tp=8", only("A", seq_length=20), "sequence-shards", "20 is not", ("seq_length=16", "tp=4")),
    ("tp=4,cp=2", only("A", seq_length=12), "sequence-shards", "TP x CP = 4 x 2 = 8",
     ("seq_length=8", "seq_length=16", "tp=2", "cp=1")),
    ("tp=4", only("A", vocab_size=65537, make_vocab_size_divisible_by=None), "vocabulary",
     "65537 is not divisible by TP = 4", ("vocab_size=65540", "tp=1")),
    ("pp=3", only("A|MM|R|E"), "depth", "cut into 4 pipeline chunks (1+2+1+1 layers)",
     ("pp=4", "pp=1")),
    ("pp=2,vpp=3", only("AMER"), "depth", "4 layers cannot be divided into 6", ("vpp=2",)),
    ("pp=1,vpp=2", only("AMER"), "virtual-without-pipeline", "PP is 1", ("vpp=none", "pp=2")),
    ("world=6", only("A", global_batch_size=16), "batch", "global 16, micro 1 × DP 6", (
        "global_batch_size=12", "global_batch_size=18")),
    ("tp=1", only("A", micro_batch_size=4, global_batch_size=18), "batch",
     "global 18, micro 4 × DP 1", ("micro_batch_size=3", "global_batch_size=16")),
    ("pp=4,vpp=1", only("AMER", global_batch_size=10), "interleaved-microbatches",
     "10 microbatches", ("global_batch_size=8", "global_batch_size=12")),
    ("pp=4,vpp=1,world=8", only("AMER", micro_batch_size=2, global_batch_size=8),
     "interleaved-microbatches", "2 microbatches", ("micro_batch_size=1", "global_batch_size=16")),
    ("tp=2,world=7", only("A", global_batch_size=7), "world-dense", "7 ranks is not", (
        "world=6", "world=8")),
    ("ep=4,world=6", only("E", global_batch_size=6), "world-expert", "ETP x EP x PP = 4", (
        "world=4", "world=8")),
]  # fmt: skip


def edited(layout: ParallelLayout, choice: str) -> ParallelLayout:
    """What a user gets who edits the layout's short form as told."""
    entries = dict(entry.split("=") for entry in layout.short().split(","))
    name, value = choice.split("=")
    entries[name] = value
    if name == "tp" and (value == "1" or layout.tp == 1):
        entries.pop("sp", None)
    return L(",".join("=".join(entry) for entry in entries.items()))


@pytest.mark.parametrize(("text", "shape", "rule", "numbers", "legal"), CASES)
def test_each_rule(
    text: str, shape: Shape, rule: str, numbers: str, legal: tuple[str, ...]
) -> None:
    violations = check_layout(L(text), shape)
    found = [violation for violation in violations if violation.rule == rule]
    assert len(found) == 1, violations
    assert numbers in found[0].message
    assert set(legal) <= set(found[0].legal)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(case[0], case[1]) for case in CASES]
    + [("tp=16,cp=5", NAM56R), ("tp=16,cp=2,pp=8", NAM56R), ("tp=3,cp=4,ep=3,world=24", NAM56R)],
)
def test_every_layout_choice_that_is_offered_does_repair(layout: str, shape: Shape) -> None:
    broken = L(layout)
    before = check_layout(broken, shape)
    assert before
    for violation in before:
        for choice in violation.legal:
            if choice.startswith(("seq_", "global_", "micro_", "vocab_", "make_", "mamba_")):
                name, value = choice.split("=")
                size: dict[str, Any] = {name: int(value)}
                after = check_layout(broken, replace(shape, **size))
            else:
                after = check_layout(edited(broken, choice), shape)
            assert violation.rule not in rules(after), (violation, choice)
            if not choice.startswith("world="):  # a new world also changes DP, and so the batch
                assert {v.axis for v in after} <= {v.axis for v in before}, (violation, choice)


@pytest.mark.parametrize(
    ("letters", "absent"),
    [
        ("A", ("mamba_num_heads", "mamba_num_groups", "m2rnn_num_heads", "num_moe_experts")),
        ("M", ("num_attention_heads", "m2rnn_num_heads", "num_moe_experts")),
        ("R", ("num_attention_heads", "mamba_num_heads", "mamba_num_groups")),
        ("E", ("num_attention_heads", "mamba_num_heads", "m2rnn_num_heads", "ffn_hidden_size")),
        ("F", ("num_attention_heads", "num_moe_experts", "m2rnn_num_heads")),
    ],
)
def test_absent_families_are_not_looked_at(letters: str, absent: tuple[str, ...]) -> None:
    for odd in (5, None):
        shape = only(letters, **dict.fromkeys(absent, odd))
        assert check_layout(L("tp=2"), shape) == []


def test_a_present_family_needs_its_sizes() -> None:
    shape = only(
        "AMERF",
        num_attention_heads=None,
        num_query_groups=None,
        mamba_num_heads=0,
        mamba_num_groups=None,
        m2rnn_num_heads=None,
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
        moe_shared_expert_intermediate_size=None,
        ffn_hidden_size=None,
    )
    violations = check_layout(L("tp=2,cp=2"), shape)
    assert len(violations) == 7
    assert {violation.axis for violation in violations} == {"MODEL"}


def test_an_undecided_batch_and_sequence_are_not_checked() -> None:
    shape = only("A", seq_length=None, global_batch_size=None)
    assert check_layout(L("tp=2,cp=2,pp=1,world=12"), shape) == []


def test_exchanged_attention_heads_bind_cp() -> None:
    shape = only("A", cp_comm_type="a2a")
    assert not check_layout(L("tp=4,cp=2"), shape)
    violation = one("tp=4,cp=4", shape)
    assert (violation.axis, violation.rule) == ("CP", "query-groups-cp")
    assert "num_query_groups = 8 is not divisible by TP x CP = 4 x 4 = 16" in violation.message
    assert {"cp_comm_type=p2p", "cp=2", "tp=2"} <= set(violation.legal)


def test_attention_and_recurrent_heads_do_not_bind_cp() -> None:
    shape = only("AR", num_attention_heads=4, num_query_groups=2, m2rnn_num_heads=3)
    assert check_layout(L("cp=8"), shape) == []


@pytest.mark.parametrize(
    ("text", "gpus", "legal"),
    [("tp=8", 4, ("tp=1", "tp=2", "tp=3", "tp=4")), ("tp=2,world=6", 3, ("tp=1", "tp=3"))],
)
def test_tp_stays_inside_a_node(text: str, gpus: int, legal: tuple[str, ...]) -> None:
    shape = only("A", num_attention_heads=48, num_query_groups=24, seq_length=48,
                 global_batch_size=12)  # fmt: skip
    assert check_layout(L(text), shape) == []
    violation = one(text, shape, gpus)
    assert violation.rule == "nvlink-tp"
    assert violation.legal == legal


def test_tp_groups_inside_one_node_need_not_divide_it() -> None:
    shape = only("A", num_attention_heads=48, num_query_groups=24, seq_length=48)
    assert (
        check_layout(L("tp=3,world=6"), replace(shape, global_batch_size=2), gpus_per_node=8) == []
    )


def test_etp_counts_as_tp_in_the_nvlink_domain() -> None:
    assert one("etp=16,world=16", gpus_per_node=8).rule == "nvlink-etp"
    assert check_layout(L("etp=16,world=16"), only("A"), gpus_per_node=8) == []


@pytest.mark.parametrize(
    ("layout", "axis", "legal"),
    [
        (ParallelLayout(tensor_model_parallel_size=0), "TP", "tp=1"),
        (ParallelLayout(context_parallel_size=-2), "CP", "cp=1"),
        (ParallelLayout(pipeline_model_parallel_size=True), "PP", "pp=1"),
        (ParallelLayout(expert_model_parallel_size=1.0), "EP", "ep=1"),  # type: ignore[arg-type]
        (ParallelLayout(expert_tensor_parallel_size=0), "ETP", "etp=none"),
        (ParallelLayout(virtual_pipeline_model_parallel_size=0), "VPP", "vpp=none"),
        (ParallelLayout(world_size=0), "DP", "world=none"),
        (ParallelLayout(sequence_parallel=1), "SP", "sp=false"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_degree_is_a_violation(layout: ParallelLayout, axis: str, legal: str) -> None:
    (violation,) = check_layout(layout, NAM56R)
    assert (violation.axis, violation.legal) == (axis, (legal,))
    assert "must be" in violation.message


def test_a_bad_degree_does_not_hide_the_others() -> None:
    layout = ParallelLayout(tensor_model_parallel_size=0, pipeline_model_parallel_size=8)
    assert rules(check_layout(layout, NAM56R)) == {"degree-tensor_model_parallel_size", "depth"}
    with pytest.raises(UserError, match="for 2 reasons"):
        validate_layout(layout, NAM56R)


def test_one_violation_stands_alone_and_names_its_choices() -> None:
    shape = only("A", micro_batch_size=4, global_batch_size=2)
    with pytest.raises(UserError) as caught:
        validate_layout(L("tp=1"), shape)
    assert str(caught.value) == (
        "Batch sizes do not fit: global 2, micro 4 × DP 1. Use micro_batch_size=1 or 2, or "
        "global_batch_size=4."
    )
    assert str(one("tp=16,etp=1", only("R"))).endswith("whole heads. Use tp=1, 2, 4 or 8.")


# --- the vocabulary


@pytest.mark.parametrize(
    ("vocab", "by", "tp", "rows"),
    [(65536, 128, 8, 65536), (65537, 128, 1, 65664), (65537, 128, 8, 65664), (100, None, 4, 100),
     (100, 0, 5, 100), (50257, 128, 1, 50304), (300, 128, 2, 384), (300, 128, 5, 640)],
)  # fmt: skip
def test_padded_vocabulary(vocab: int, by: int | None, tp: int, rows: int) -> None:
    assert padded_vocab_size(vocab, by, tp) == rows


def test_unpadded_vocabulary_must_divide() -> None:
    with pytest.raises(UserError, match="100 is not divisible by TP = 3, and padding is off"):
        padded_vocab_size(100, None, 3)


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Shape) if isinstance(getattr(NAM56R, field.name), int)]
)
def test_a_negative_size_is_a_violation_or_not_read(name: str) -> None:
    for layout in ("tp=1", "tp=2,cp=2,pp=2,ep=2,etp=1"):
        for violation in check_layout(L(layout), replace(NAM56R, **{name: -1})):
            assert str(violation)
