"""The samples that the articles name: each runs as a program and prints its result."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "tp_partition_shapes",
            (
                "TP=8, query heads of a rank: 7 (448 columns), KV heads: 1 (64 columns), 7:1",
                "linear_proj.weight 3584 x 448 axis 1 by tp",
                "linear_qkv.weight 576 x 3584 axis 0 by tp",
            ),
        ),
        (
            "three_d_parallelism",
            (
                "rank 5: dense layers tp=1 dp=0 pp=1, experts ep=1 edp=0 pp=1",
                "tp groups: [0, 1] [2, 3] [4, 5] [6, 7]",
                "pp groups: [0, 4] [1, 5] [2, 6] [3, 7]",
            ),
        ),
        (
            "chunk_boundary_remap",
            (
                "rank 0 in attention: [0, 1, 2, 3, 12, 13, 14, 15]",
                "rank 0 in attention: [0, 3, 4, 5, 6, 13, 14, 15]",
                "[[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]",
                "and back, every token in its place: True",
            ),
        ),
        (
            "ep_tp_needs_sp",
            (
                "tp=2,ep=2,etp=1,sp=false: illegal",
                "nearest legal layout: tp=2,sp=true,ep=2,etp=1",
                "tp=2,ep=2,etp=1,sp=true: legal",
                "ep=2,sp=false: legal",
            ),
        ),
        (
            "pattern_to_stages",
            (
                "stage 0: embedding A E M E A E: ",
                "stage 0: embedding A E M E A E M: ",
                "stage 1: E A E and E M R head: ",
            ),
        ),
    ],
)
def test_a_sample_prints_its_result(
    name: str, lines: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = " ".join(_printed(name, capsys).split())
    assert "False" not in shown
    for line in lines:
        assert " ".join(line.split()) in shown, f"{line!r} not in {shown}"


@pytest.mark.slow  # starts ranks; tests/proof/test_ladder.py has a ladder of all families
@pytest.mark.processes
def test_the_canary_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _printed("canary_ladder", capsys)
    assert ended.value.code == 0
    assert "every rung gives the numbers of one rank" in capsys.readouterr().out


def test_every_sample_is_listed_and_run() -> None:
    page = (EXAMPLES.parent / "docs" / "samples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in page, path.name
