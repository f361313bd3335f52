"""The rules of tags on reports made by hand: two ranks, one parameter."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.proof.tag_check import Held, Part, Ranks, RankTags, TagViolation, violations

BOTH: Ranks = (0, 1)
ALONE: tuple[Ranks, Ranks] = ((0,), (1,))


def _part(first: int, end: int, whole: int = 4) -> tuple[Part, ...]:
    return (Part("layer.weight", (whole, 3), ((first, end), (0, 3)), 0),)


LOW, HIGH, WHOLE = _part(0, 2), _part(2, 4), _part(0, 4)


def _held(parts: tuple[Part, ...], **changes: Any) -> Held:
    held = Held(
        parts,
        expert=False,
        counted=True,
        summed_over_tp=False,
        tagged=False,
        partition_dim=-1,
        shared=False,
        digest=b"",
    )
    return held._replace(**changes)


def _tp(first: Held, second: Held) -> list[TagViolation]:
    """Two tensor-parallel ranks, each its own data-parallel replica."""
    return violations(
        [
            RankTags({"weight": held}, (BOTH, BOTH), (alone, alone), (BOTH, BOTH))
            for held, alone in zip((first, second), ALONE, strict=True)
        ]
    )


def _dp(first: Held, second: Held) -> list[TagViolation]:
    """Two data-parallel ranks."""
    return violations(
        [
            RankTags({"weight": held}, (alone, alone), (BOTH, BOTH), (alone, alone))
            for held, alone in zip((first, second), ALONE, strict=True)
        ]
    )


def _pp(first: Held, second: Held) -> list[TagViolation]:
    """Two pipeline stages."""
    return violations(
        [
            RankTags({"weight": held}, (alone, alone), (alone, alone), (BOTH, BOTH))
            for held, alone in zip((first, second), ALONE, strict=True)
        ]
    )


SPLIT = _held(HIGH, tagged=True)
SUMMED = _held(WHOLE, summed_over_tp=True)


def test_what_is_tagged_as_it_is_held() -> None:
    assert _tp(_held(LOW, tagged=True, partition_dim=0), _held(HIGH, tagged=True)) == []
    assert _tp(_held(WHOLE), _held(WHOLE, counted=False)) == []
    assert _tp(SUMMED, SUMMED._replace(counted=False)) == []
    assert _dp(_held(WHOLE), _held(WHOLE)) == []
    assert _pp(_held(WHOLE), _held(WHOLE, counted=False, shared=True)) == []


@pytest.mark.parametrize(
    ("found", "problem", "remedy"),
    [
        (
            _tp(_held(LOW), _held(HIGH, counted=False)),
            "counts one of the parts only",
            "set_tensor_model_parallel_attributes(parameter, True, 0, 1)",
        ),
        (
            _tp(_held(WHOLE, tagged=True), _held(WHOLE, tagged=True)),
            "counts it 2 times",
            "leave the tag off",
        ),
        (
            _tp(_held(LOW, tagged=True, partition_dim=1), SPLIT),
            "split its axis 0, and its partition_dim is 1",
            "True, 0, 1",
        ),
        (
            _tp(_held(LOW, tagged=True, summed_over_tp=True), SPLIT),
            "summed over tensor-parallel ranks, which hold different parts",
            "parameter.sequence_parallel = False",
        ),
        (
            _tp(_held(WHOLE, digest=b"1"), _held(WHOLE, counted=False, digest=b"2")),
            "have different values",
            "outside get_cuda_rng_tracker().fork()",
        ),
        (_tp(_held(()), _held(())), "not in the model's sharded_state_dict", "keep_vars=True"),
        (
            _dp(_held(WHOLE), _held(_part(4, 8, 8))),
            "as that of a dense parameter, over ranks that hold different parts",
            "parameter.allreduce = False",
        ),
        (_pp(_held(WHOLE), _held(WHOLE)), "several pipeline stages", "parameter.shared = True"),
        (
            _pp(_held(WHOLE, counted=False, shared=True), _held(WHOLE, counted=False, shared=True)),
            "shared wherever it is held",
            "on copies only",
        ),
    ],
)
def test_what_is_not(found: list[TagViolation], problem: str, remedy: str) -> None:
    told = next(violation for violation in found if problem in violation.problem)
    assert remedy in told.remedy
    assert told.parameter in ("layer.weight", "weight")
