"""A job's communicators by the groups of its layout, from NCCL's log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp import cli
from nemo_megacpp.doctor.job_groups import GroupKind, match_groups
from nemo_megacpp.doctor.nccl_log import Process, read_communicators
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from tests.doctor.nccl_samples import log_of

_LAYOUT = ParallelLayout.parse("tp=4,cp=2,pp=2,ep=2,etp=1,world=16")
_BLOCK = [f"node{rank // 8}" for rank in range(16)]
_CYCLIC = [f"node{rank % 2}" for rank in range(16)]


def _placement(log: Path, *arguments: str) -> int:
    args = cli.read_arguments(["placement", str(log), *arguments])
    return int(args.run(args))


def _kinds(log: str, layout: ParallelLayout) -> dict[str, GroupKind]:
    return {kind.name: kind for kind in match_groups(read_communicators(log.splitlines()), layout)}


@pytest.fixture
def block(tmp_path: Path) -> Path:
    log = tmp_path / "block.log"
    log.write_text(log_of(_LAYOUT, _BLOCK))
    return log


def test_a_communicator_by_its_lines() -> None:
    """Lines of NCCL 2.18, 2.25 (with a launcher's prefix) and a split one of 2.27."""
    text = """
a: a:19484:21054 [0] NCCL INFO comm 0x557e rank 0 nranks 2 cudaDev 0 nvmlDev 0 busId 4f000 commId 0x9ad9 - Init START
b:19485:21058 [1] NCCL INFO comm 0x55d8 rank 1 nranks 2 cudaDev 1 nvmlDev 1 busId 52000 commId 0x9ad9 - Init START
b:19485:21058 [1] NCCL INFO Channel 01/0 : 1[1] -> 0[0] [send] via NET/IB/3(0)/GDRDMA
[2026-11-22 10:00:00] b:19485:21059 [1] NCCL INFO ncclCommSplit comm 0x6 rank 0 nranks 1 cudaDev 1 nvmlDev 1 busId 52000 commId 0x7 parent 0x55d8 childCount 2 color 5 key 0 - Init COMPLETE
b:19485:21060 [1] NCCL INFO Channel 00 : 0[1] -> 1[0] via SHM/direct/direct
"""  # noqa: E501  # as NCCL writes them
    whole, split = read_communicators(text.splitlines())
    assert whole.name == "0x9ad9" and whole.transports == {"NET"}
    assert whole.members == (Process("a", 19484), Process("b", 19485))
    assert split.members == (Process("b", 19485),) and not split.transports


def test_every_group_is_named() -> None:
    kinds = _kinds(log_of(_LAYOUT, _BLOCK), _LAYOUT)
    assert kinds["tp"].found == kinds["tp"].expected == 4 and kinds["tp"].nodes == 1
    assert kinds["tp"].transports == ("P2P",)
    pipeline = next(kind for name, kind in kinds.items() if name.split(", ")[0] == "pp")
    assert pipeline.nodes == 2 and pipeline.transports == ("NET",)
    assert not any(kind.leaves_its_node for kind in kinds.values()) and "other" not in kinds


def test_a_tp_group_that_leaves_its_node_fails(
    tmp_path: Path, block: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ("--layout", "tp=4,cp=2,pp=2,ep=2,etp=1")
    assert _placement(block, *layout) == 0
    assert "every TP group is inside a node" in capsys.readouterr().out
    cyclic = tmp_path / "cyclic.log"
    cyclic.write_text(log_of(_LAYOUT, _CYCLIC))
    assert _placement(cyclic, *layout) == 1
    assert "leave their node: tp." in capsys.readouterr().out
    assert _placement(cyclic, *layout, "--json") == 1
    document: Any = json.loads(capsys.readouterr().out)
    assert document["inside_nodes"] is False
    assert document["groups"][0] | {"widest": 0} == {
        **{"name": "tp", "size": 4, "expected": 4, "found": 4, "nodes": 2},
        **{"widest": 0, "transports": ["NET"]},
    }


def test_pairs_and_strangers_are_told() -> None:
    layout = ParallelLayout.parse("tp=2,pp=4,world=8")
    hosts = ["node0"] * 8
    text = log_of(layout, hosts)
    for number, (first, second) in enumerate(((0, 2), (0, 3))):
        for place, rank in enumerate((first, second)):
            text += (
                f"node0:{1000 + rank}:7 [0] NCCL INFO comm 0x1 rank {place} nranks 2 cudaDev 0 "
                f"busId 1000 commId 0xabc{number} - Init COMPLETE\n"
            )
    kinds = _kinds(text, layout)
    assert kinds["pp pair"].widest == (0, 2) and kinds["other"].widest == (0, 3)
    assert kinds["pp pair"].expected is None


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        (lambda text: "no NCCL here\n", "tp=2", "names no communicators"),
        (
            lambda text: "\n".join(x for x in text.splitlines() if "node1" not in x),
            "tp=4",
            "has 16 ranks, of which the log names 8; rank 8 is missing",
        ),
        (
            lambda text: log_of(ParallelLayout.parse("pp=16"), _BLOCK),
            "tp=4",
            "No communicator of the log joins a TP group of TP=4",
        ),
        (lambda text: text, "tp=3", "16 ranks is not divisible by TP x CP x PP = 3"),
        (
            lambda text: text,
            "tp=4,world=32",
            "has 32 ranks, and the log no communicator of so many",
        ),
        (
            lambda text: text.replace("rank 3 nranks 16", "rank 3 nranks 15"),
            "tp=4",
            "contradicts itself about communicator",
        ),
        (
            lambda text: (
                text
                + log_of(ParallelLayout.parse("tp=2"), ["x", "x"]).replace("0x9ad9b5e4", "0xfff")
            ),
            "tp=4",
            "the log holds several jobs",
        ),
    ],
)
def test_what_a_log_cannot_answer(block: Path, change: Any, layout: str, message: str) -> None:
    block.write_text(change(block.read_text()))
    with pytest.raises(UserError, match=message):
        _placement(block, "--layout", layout)


def test_a_log_needs_a_layout(block: Path) -> None:
    with pytest.raises(UserError, match=r"--layout tp=8,pp=2 or --recipe"):
        _placement(block)
    with pytest.raises(UserError, match=r"none\.log is not a file"):
        _placement(block.parent / "none.log", "--layout", "tp=2")


def test_communicators_of_another_layout_are_told(
    block: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its groups of TP x CP look like TP groups of this one."""
    assert _placement(block, "--layout", "tp=8,pp=2") == 0
    assert "20 communicators join no group of this layout" in capsys.readouterr().out


def test_the_layout_of_a_recipe(block: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _placement(block, "--recipe", "nam56r_tiny", "--layout", "tp=4,cp=2,pp=2,ep=2") == 0
    assert "TP=4 SP CP=2 EP=2 ETP=1 PP=2 (16 ranks" in capsys.readouterr().out
