"""What a run records, its summary and its page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.cli import build_parser
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import from_mapping
from nemo_megacpp.runs import run_page
from nemo_megacpp.runs.curves import read_curve
from nemo_megacpp.runs.events import append_record, read_events, record_event
from nemo_megacpp.runs.record import read_run
from nemo_megacpp.runs.run_folder import EVENTS_FILE, METRICS_FILE, RECIPE_FILE
from nemo_megacpp.runs.run_page import write_page
from nemo_megacpp.runs.summary import show_seconds, show_speed, summarize


def step(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "step": number,
        "loss": 6.0 - number / 10,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "seconds": 0.5,
        "tokens_per_second": 100.0 * number,
        "tflops_per_rank": 0.02,
        "mfu": 0.25,
        "aux": {"seq_load_balancing_loss": 1.01},
    }
    return {**record, **changes}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was resumed once."""
    folder = tmp_path / "run <1>"
    for number in range(1, 6):
        append_record(folder / METRICS_FILE, step(number, memory=number * 2**30))
        if number in (2, 4):
            append_record(
                folder / METRICS_FILE, {"step": number, "heldout_loss": 6.2 - number / 10}
            )
    record_event(folder, "started", 0, layout="TP=1", ranks=1, startup_seconds=20)
    record_event(folder, "checkpoint", 4, path="checkpoints/step=4")
    record_event(folder, "resumed", 4, layout="TP=2 <SP>", ranks=2, checkpoint="step=4")
    append_record(folder / METRICS_FILE, step(5, loss=5.25))
    return folder


def test_a_cut_line_costs_that_line_only(run_dir: Path) -> None:
    path = run_dir / METRICS_FILE
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')  # killed while it was being written
    append_record(path, step(7))
    assert sorted(read_curve(run_dir).steps) == [1, 2, 3, 4, 5, 7]
    events = run_dir / EVENTS_FILE
    events.write_bytes(events.read_bytes()[:-3])
    assert [event.kind for event in read_events(run_dir)] == ["started", "checkpoint"]
    record_event(run_dir, "failed", 7, reason="loss is nan")
    assert read_events(run_dir)[-1].details == {"reason": "loss is nan"}


def test_summary(run_dir: Path) -> None:
    summary = summarize(run_dir)
    assert summary is not None
    assert summary.status == "not ended"
    assert (summary.steps, summary.loss) == ((1, 5), (5.9, 5.25))
    assert summary.heldout == ((2, 6.0), (4, pytest.approx(5.8)))
    assert summary.tokens_per_second == 300.0
    assert summary.memory == 4 * 2**30  # the step that was made again did not record it
    assert summary.checkpoints == 1
    record_event(run_dir, "stopped", 5)
    ended = summarize(run_dir)
    assert ended is not None
    assert ended.status == "stopped"
    rows = dict(ended.rows())
    assert rows["loss"] == "5.9000 → 5.2500"
    assert rows["held-out loss"] == "6.0000 (step 2) → 5.8000 (step 4)"
    assert rows["peak memory"] == "4.00 GiB on the fullest rank"
    assert rows["speed (medians)"] == "300 tokens/s, 20.0 GFLOP/s per rank, MFU 25.0%"
    assert rows["time"] == "training 0 s (start-up 20 s)"


def test_speed_of_runs_that_recorded_less(run_dir: Path) -> None:
    assert show_speed({"tokens_per_second": 12345.6}) == ["12,346 tokens/s"]
    fast = {"tokens_per_second": 1.0, "tflops_per_rank": 412.34, "mfu": 0.4168}
    assert show_speed(fast, "GPU") == ["1 tokens/s", "412 TFLOP/s per GPU", "MFU 41.7%"]


def test_training_time_is_that_of_all_sessions(run_dir: Path) -> None:
    (run_dir / EVENTS_FILE).unlink()
    for kind, minute in (
        ("started", 0),
        ("checkpoint", 3),  # then killed
        ("resumed", 50),
        ("finished", 57),
    ):
        time = f"2026-01-01T10:{minute:02}:00+00:00"
        append_record(run_dir / EVENTS_FILE, {"kind": kind, "step": 1, "time": time, "details": {}})
    summary = summarize(run_dir)
    assert summary is not None
    assert summary.seconds == 600
    assert dict(summary.rows())["time"] == "training 10 min 00 s", "no start-up was recorded"
    assert show_seconds(7384) == "2 h 03 min"


def test_page(run_dir: Path) -> None:
    recipe = from_mapping({"recipe": "nam56r_tiny", "tp": 2, "etp": 1, "packed_documents": True})
    (run_dir / RECIPE_FILE).write_text(yaml.safe_dump(recipe.to_mapping()))
    checkpoint = run_dir / "checkpoints" / "step=4"
    checkpoint.mkdir(parents=True)
    write_identity(checkpoint, {"model": {}, "tokenizer": ""}, 4)
    out = write_page(read_run(run_dir))
    assert out == run_dir / "record" / "report.html"
    text = out.read_text()
    assert "<h1>run &lt;1&gt; <span" in text
    for part in (
        "<th>tensor_model_parallel_size</th><td>2</td>",
        "<th>packed_documents</th><td>true</td>",
        "AEMEAEMEAEMR",
        "checkpoint: step=4",
        "layout: TP=2 &lt;SP&gt;",
        "Dotted: resumed at step 4.",
        "packed_documents: true",
    ):
        assert part in text, part
    assert str(checkpoint).replace("<", "&lt;").replace(">", "&gt;") in text
    # Nothing that the page would have to fetch.
    assert not re.search(r"(src|href)=\"(?!#)", text)
    svg = re.findall("<svg.*?</svg>", text, re.DOTALL)[0]
    ElementTree.fromstring(svg)
    for title in ("loss (nats per token)", "held-out", "auxiliary loss", "gradient norm",
                  "learning rate", "tokens per second", "TFLOP/s per rank", "MFU",
                  "peak memory"):  # fmt: skip
        assert title in svg, title


def test_page_of_a_run_that_recorded_little(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / EVENTS_FILE).unlink()
    (run_dir / METRICS_FILE).write_text("")
    append_record(run_dir / METRICS_FILE, step(1, grad_norm=None, aux={}))
    text = write_page(read_run(run_dir), tmp_path / "page.html").read_text()
    assert "None recorded." in text
    assert "gradient norm" not in text
    assert "not recorded" in text


def test_thinning_keeps_the_spikes() -> None:
    points = [(number, 1.0) for number in range(100_000)]
    points[77_777] = (77_777, 50.0)
    points[5] = (5, -3.0)
    kept = run_page.thinned(points)
    assert len(kept) <= 1200
    assert {(77_777, 50.0), (5, -3.0)} <= set(kept)
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (METRICS_FILE, {**step(6), "loss": []}),
        (METRICS_FILE, {**step(6), "step": "6"}),
        (METRICS_FILE, {**step(6), "memory": [[]]}),
        (METRICS_FILE, {**step(6), "aux": {"z": "x"}}),
        (METRICS_FILE, {"step": 6, "heldout_loss": None}),
        (METRICS_FILE, [6]),
        (EVENTS_FILE, {"kind": "started", "step": 6, "time": 7, "details": {}}),
        (EVENTS_FILE, {"kind": "started", "step": 6, "time": "2026-01-01", "details": {}}),
    ],
)
def test_a_record_of_wrong_types_is_refused(run_dir: Path, file: str, line: Any) -> None:
    with (run_dir / file).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=f"{Path(file).name} is damaged"):
        write_page(read_run(run_dir))


def test_a_line_nested_without_end_costs_that_line_only(run_dir: Path) -> None:
    with (run_dir / METRICS_FILE).open("a") as stream:
        stream.write("[" * 100_000 + "\n")
    assert max(read_curve(run_dir).steps) == 5


def test_refusals(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(UserError, match="nowhere' does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run with a step: it has no record/metrics"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl' is not a folder"):
        read_run(run_dir / METRICS_FILE)
    with pytest.raises(UserError, match=r"Cannot write .*: No such file or directory"):
        write_page(read_run(run_dir), tmp_path / "no" / "page.html")
    (run_dir / METRICS_FILE).write_text('{"loss": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: step: field required"):
        read_run(run_dir)
    (run_dir / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match="has not made a step yet"):
        read_run(run_dir)


def test_the_command_adds_the_plan(run_dir: Path) -> None:
    recipe = from_mapping({"recipe": "nam56r_tiny", "tp": 2, "etp": 1})
    (run_dir / RECIPE_FILE).write_text(yaml.safe_dump(recipe.to_mapping()))
    args = build_parser().parse_args(["report", str(run_dir)])
    assert args.run(args) == 0
    text = (run_dir / "record" / "report.html").read_text()
    plan = text[text.index("<h2>Plan</h2>") : text.index("<h2>Events</h2>")]
    assert plan.count("<svg") == 2
    assert "embedding, head" in plan
    assert "<th>measured peak</th><td>4.29 GB</td>" in plan
    assert "The measured peak also holds temporaries" in plan
    assert "before the model was built" not in plan, "this run did not record it"


def test_the_plan_stands_beside_the_memory_that_the_model_added(run_dir: Path) -> None:
    recipe = from_mapping({"recipe": "nam56r_tiny", "tp": 2, "etp": 1})
    (run_dir / RECIPE_FILE).write_text(yaml.safe_dump(recipe.to_mapping()))
    append_record(run_dir / METRICS_FILE, step(6, memory=1.3e9, memory_added=0.25e9))
    (run_dir / METRICS_FILE).write_text(
        (run_dir / METRICS_FILE).read_text().splitlines()[-1] + "\n"
    )
    text = write_page(read_run(run_dir)).read_text()
    for row in (
        "<th>planned</th><td>136 MB</td>",
        "<th>measured peak</th><td>1.30 GB</td>",
        "<th>before the model was built</th><td>1.05 GB</td>",
        "<th>added by model, optimizer and training</th><td>250 MB</td>",
    ):
        assert row in text, row
