"""The benchmark scripts run on a machine without a GPU, and fail where a form is wrong."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import published_steps
from benchmarks.harness import Row, Sample, explain, peak_bytes, profile_table, record
from benchmarks.page import write

M2RNN = Path(__file__).parents[1] / "benchmarks" / "m2rnn.py"
SMALL = "--device cpu --length 16 --heads 2 --key-dim 4 --value-dim 3 --repeats 1 --threads 1"


def _main(monkeypatch: pytest.MonkeyPatch, arguments: str, **replaced: Any) -> int:
    names = runpy.run_path(str(M2RNN))
    monkeypatch.setattr(sys, "argv", ["m2rnn.py", *arguments.split()])
    names["main"].__globals__.update(replaced)
    status: int = names["main"]()
    return status


def test_m2rnn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(monkeypatch, SMALL) == 0
    printed = capsys.readouterr().out
    assert "torch                       largest relative difference" in printed
    assert "the Triton kernel: it needs a CUDA device" in printed
    assert "eager loop, indexing" in printed and "at most a tenth" in printed


def test_m2rnn_tells_a_wrong_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_megacpp.mixers.kernels.m2rnn_scan import m2rnn_scan

    def unclipped(*tensors: Any, **options: Any) -> Any:
        return m2rnn_scan(*tensors, **options | {"state_gradient_clip": None})

    assert _main(monkeypatch, SMALL, m2rnn_scan=unclipped) == 1
    printed = capsys.readouterr().out
    assert "clip" in printed.splitlines()[0] and "More than 1e-05 from the reference" in printed


def _row(**fields: Any) -> Row:
    return Row("a claim", Sample([1.0, 2.0, 4.0]), Sample([3.0, 2.0, 4.0]), "a peer", **fields)


def test_the_ratio_is_the_median_over_pairs_and_aims_are_met_or_missed() -> None:
    assert _row().ratio == 1.0 and _row().met is None
    assert _row(aim_ratio=1 / 1.02).met and not _row(aim_ratio=2.0).met
    assert _row(aim_at_most=2.0).met and not _row(aim_at_most=1.9).met
    share = _row(operations=1e9, peak=2e9, aim_share=0.25)
    assert share.share == 0.25 and share.met


def test_peak_memory_is_what_a_step_holds_at_once() -> None:
    def step() -> None:
        first = torch.ones(1 << 18) + 1  # 1 MiB, and the ones, which are freed
        (first * 2).sum()

    assert peak_bytes(step, "cpu") == pytest.approx(2 << 20, rel=0.01)


def test_a_missed_aim_is_explained_and_a_met_one_is_not() -> None:
    x = torch.ones(512, 512)

    def work() -> None:
        for _ in range(10):
            (x @ x).sin_()

    assert not explain(_row(), work, "cpu").profile
    assert not explain(_row(aim_at_most=2.0), work, "cpu").profile
    missed = explain(_row(aim_ratio=2.0), work, "cpu", ("token", 10))
    calls = {entry["operation"]: entry["calls"] for entry in missed.profile}
    assert calls["mm"] == calls["sin_"] == 1.0
    assert all(entry["seconds"] > 0 for entry in missed.profile)
    shown = profile_table(record(missed))
    assert shown.columns[1] == "calls a token" and len(shown.rows) == len(missed.profile)


def test_results_are_written_into_their_part_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    parts = "".join(f"<!-- results: {d} -->\nold\n<!-- end -->\n" for d in ("cpu", "cuda"))
    page.write_text(f"# Title\n{parts}by hand\n", encoding="utf-8")
    machine = {"kind": "cuda", "device": "a GPU", "threads": 2, "date": "today", "load": 0.1}
    missed = explain(_row(aim="2x", aim_ratio=2.0), lambda: torch.ones(9).cos(), "cpu")
    scripts: list[dict[str, Any]] = [
        {"script": "ours", "problem": "", "rows": [record(missed)]},
        {"script": "other", "problem": "exit status 1"},
    ]
    bench = {
        "machine": {**machine, "commit": "abc", "versions": {"torch": "2.11"}},
        "scripts": scripts,
        "skipped": [("M layers", "needs mamba_ssm")],
    }
    write(bench, page)
    written = page.read_text(encoding="utf-8")
    assert written.startswith("# Title\n<!-- results: cpu -->\nold\n<!-- end -->\n")
    assert written.endswith("<!-- end -->\nby hand\n")
    for part in ("| a claim | 2 s (1..4) |", "**missed**", "commit `abc`", "- other failed: exit"):
        assert part in written, written
    assert "*a claim*" in written and "| cos | 1 |" in written
    assert "- M layers: needs mamba_ssm" in written


def test_nothing_in_benchmarks_imports_nemo() -> None:
    for script in M2RNN.parent.glob("*.py"):
        for line in script.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in ("nemo", "nemo_run"), f"{script}: {line}"
                assert not words[1].startswith("nemo_megacpp.nemo"), f"{script}: {line}"


@pytest.mark.slow
def test_the_table_of_published_steps_is_what_the_script_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert published_steps.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == len(published_steps.ROWS)
    page = (Path(__file__).parents[1] / "docs" / "estimates.md").read_text()
    assert not [row for row in rows if row not in page]
