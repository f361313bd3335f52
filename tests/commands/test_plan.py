"""``nemo-megacpp plan``: what it prints, refuses and writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.cli import read_arguments
from nemo_megacpp.core.fsdp import problem_with_fsdp
from nemo_megacpp.errors import UserError

BIG = "--world-size 1024 --layout tp=8,pp=4,cp=1,ep=8,etp=1"


def plan(line: str, capsys: Any) -> tuple[int, str, str]:
    args = read_arguments(["plan", *line.split()])
    code = args.run(args)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refusal(line: str) -> str:
    args = read_arguments(["plan", *line.split()])
    with pytest.raises(UserError) as refused:
        args.run(args)
    return str(refused.value)


def test_settings_may_stand_anywhere(capsys: Any) -> None:
    args = read_arguments(["plan", "nam56r", "a=1", "--json", "b=2", "--stage", "0", "c=3"])
    assert args.overrides == ["a=1", "b=2", "c=3"]
    for stray in (["--jsno"], ["word"]):
        with pytest.raises(SystemExit):
            read_arguments(["plan", "nam56r", "--json", *stray])
        assert f"unrecognized arguments: {stray[0]}" in capsys.readouterr().err


def test_the_articles_job(capsys: Any) -> None:
    code, out, _ = plan(f"nam56r {BIG} --hbm 141GB", capsys)
    assert code == 0
    for part in (
        "5,197,342,088 parameters",
        "(1024 ranks: DP=32, expert DP=32)",
        "AEMEAEMEAEMRA + embedding",
        "EAEMEAEMRAEME + head",
        "and fits 141 GB",
        "not measured on a GPU",
        "Pipeline bubble: 38% (PP=4, 8 microbatches)",
        "Uneven stages: 3 to 4 A, 3 to 4 M, 5 to 6 E blocks per stage (PP=4)",
    ):
        assert part in out


def test_one_family_and_one_stage(capsys: Any) -> None:
    _, out, _ = plan("nam56r_tiny --layout tp=2,cp=2,etp=1 --family R --kernels torch", capsys)
    for part in (
        "mixer.in_proj.shared_weight",
        "whole: shared by all heads",
        "replicated on tp",
        "gather boundary",
        "layout transition",
        "states of the recurrence, one in 16",
        "compared with recorded runs",
    ):
        assert part in out
    _, out, _ = plan("nam56r_tiny --layout pp=2,world=4 --stage 1", capsys)
    assert "What a rank of stage 1 sends" in out
    assert "Once per step" in out


def test_json_and_page(capsys: Any, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    code, out, _ = plan(
        f"nam56r {BIG} --json --html {page} use_distributed_optimizer=false", capsys
    )
    document = json.loads(out)
    assert (code, document["schema"], document["legal"], document["fits"]) == (0, 1, True, None)
    assert [stage["first_rank"] for stage in document["stages"]] == [0, 256, 512, 768]
    memory = document["stages"][0]["memory"]
    # Decays, step sizes and skips stay float32, and need no copy: of 3 M and 1 R at TP=8.
    kept = 3 * 3 * 7 + 28 * (1 + 1 + 16)
    assert memory["parameters"] == 2 * document["stages"][0]["parameters"] + 2 * kept
    assert memory["optimizer"] == 12 * document["stages"][0]["parameters"] - 4 * kept
    assert memory["in_flight"] == [4]
    text = page.read_text()
    assert text.count("<svg") == text.count("</svg>") == 3
    assert not re.search(r"https?://|<script|<link|src=|url\(", text)


def test_the_page_lists_the_cuts(capsys: Any, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    line = f"nam56r_tiny pattern=AR|ER depth=4 m2rnn_depth_state=true --html {page} pp="
    for stages, cuts in ((2, 1), (1, 0)):
        assert plan(f"{line}{stages} tp=1", capsys)[0] == 0
        text = page.read_text()
        assert text.count("<h2>What crosses a cut</h2>") == cuts
        assert (
            text.count("<td>R|E</td>") == cuts and text.count("m2rnn_depth_state 32.8 KB") == cuts
        )


def test_a_family_shows_the_collectives_of_its_depth_state(capsys: Any) -> None:
    line = "nam56r_tiny pattern=ARER depth=4 tp=2 cp=2 etp=1 --world-size 4 --family R"
    code, without, _ = plan(line, capsys)
    assert code == 0 and "depth state" not in without
    _, out, _ = plan(f"{line} m2rnn_depth_state=true", capsys)
    for part in ("depth state, but in the first R", "summed over heads, but in the last R"):
        assert part in " ".join(out.split())


def test_an_illegal_layout_is_answered(capsys: Any) -> None:
    line = "nam56r --world-size 128 --layout tp=16,pp=8,cp=3,ep=3,sp=false seq_length=4096"
    code, out, err = plan(line, capsys)
    assert (code, out) == (2, "")
    for part in (
        "num_attention_heads = 56 is not divisible by TP = 16",
        "num_query_groups = 8 is not divisible by TP = 16",
        "TP = 16 does not fit the NVLink domain of 8 GPUs",
        "52 layers cannot be divided into 8 equal pipeline chunks",
        "num_moe_experts = 16 is not divisible by EP = 3",
        "seq_length = 4096 is not divisible by 2 x CP = 6",
        "needs sequence parallelism",
        "A world of 128 ranks is not divisible by TP x CP x PP = 384",
        "Nearest legal layouts: ",
    ):
        assert part in err
    for layout in re.search(r"Nearest legal layouts: (.*)\.", err)[1].split("; "):  # type: ignore[index]
        assert plan(f"nam56r --layout {layout} seq_length=4096 --json", capsys)[0] == 0


def test_where_no_layout_of_the_world_is_legal(capsys: Any) -> None:
    """Three divides 96 ranks, and neither the depth, the heads, the experts nor the batch."""
    code, _, err = plan("nam56r --world-size 96 --layout tp=8", capsys)
    assert code == 2
    assert "in a world of another size" in err
    assert "tp=8" in err.splitlines()[-1]


def test_an_illegal_layout_as_json(capsys: Any) -> None:
    code, out, _ = plan("nam56r_tiny --layout tp=3 --json", capsys)
    document = json.loads(out)
    assert (code, document["legal"]) == (2, False)
    assert {item["rule"] for item in document["violations"]} >= {"attention-heads", "query-groups"}
    assert document["nearest"][0].startswith("tp=")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nam56r --world-size 0", "a whole number from 1 to 1,048,576"),
        ("nam56r world=1000000000", "A world of 1,000,000,000 ranks cannot be planned"),
        ("nam56r --layout world=8 --world-size 16", "world=8 of --layout and --world-size 16"),
        ("nam56r --hbm h200", "'h200' is not a memory size"),
        ("nam56r --gpus-per-node 0", "--gpus-per-node '0' must be a whole number from 1"),
        ("nam56r_tiny --family Q", "the model has embedding, A, E, M, R, head"),
        ("nam56r_tiny --stage 1", "the stages are 0 to 0"),
        ("nam57r", "There is no recipe 'nam57r'"),
    ],
)
def test_what_cannot_be_read(line: str, message: str) -> None:
    assert message in refusal(line)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("world", "batch", "seconds"),
    [(1024, 256, 15), pytest.param(16384, 4096, 30, marks=pytest.mark.slow)],
)
def test_scale(world: int, batch: int, seconds: int) -> None:
    """1,024 ranks in 15 s of processor time and 2 GiB, imports included; 16,384 in twice that."""
    command = f"plan nam56r {BIG} --json global_batch_size={batch}".replace("1024", str(world))
    started = subprocess.Popen(
        [sys.executable, "-m", "nemo_megacpp.cli", *command.split()], stdout=subprocess.PIPE
    )
    assert started.stdout is not None
    with started.stdout:
        assert json.load(started.stdout)["job"]["world_size"] == world
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    assert started.returncode == 0
    assert used.ru_utime + used.ru_stime < seconds
    assert used.ru_maxrss < 2 * 2**20  # KiB


def test_which_model_was_assumed_is_said(capsys: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("pattern: AEMR\ntp: 1\n", encoding="utf-8")
    said = "defaults taken: recipe: nam56r_tiny; num_layers: 12 (depth of the recipe)\n"
    for line in (f"plan {mine} --json", f"layouts {mine} --world-size 1 --json"):
        args = read_arguments(line.split())
        assert args.run(args) == 0
        printed = capsys.readouterr()
        json.loads(printed.out)
        assert printed.err == said
    args = read_arguments(["megatron-args", str(mine)])
    assert args.run(args) == 0
    assert said in capsys.readouterr().err


def test_a_users_family_is_on_the_page(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "short_conv.py"
    page = tmp_path / "plan.html"
    settings = [f"family_modules=[{example}]", "pattern=CEMR"]
    args = read_arguments(["plan", "nam56r_tiny", *settings, "--html", str(page)])
    assert args.run(args) == 0
    text = page.read_text()
    assert "C short convolution" in text and "layer 0, C" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data-parallel-sharding-strategy optim", "has no effect without --use-megatron-fsdp"),
        (
            "--use-megatron-fsdp --data-parallel-sharding-strategy no_shard",
            "no_shard: legal are optim, optim_grads, optim_grads_params.",
        ),
        ("--use-megatron-fsdp --stage 0 --html page", "only. Leave out --stage, --html."),
    ],
)
def test_options_of_fsdp_that_contradict_each_other(words: str, message: str) -> None:
    assert message in refusal(f"nam56r_tiny {words}")


def test_fsdp_where_it_is_not_proved() -> None:
    problem = problem_with_fsdp()
    if problem is None:
        pytest.skip("this release has FSDP in the form that is proved")
    assert problem in refusal("nam56r_tiny --layout tp=2,world=4 --use-megatron-fsdp")
