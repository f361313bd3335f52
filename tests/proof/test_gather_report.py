"""What ``nemo-megacpp gathers`` prints, of gathers that were recorded."""

from __future__ import annotations

import json

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather_recorder import RecordedGather
from nemo_megacpp.proof.gather_report import gather_rows, gathers_document, print_gathers
from nemo_megacpp.proof.gather_run import inspect_gathers
from nemo_megacpp.proof.gather_verdicts import judge
from nemo_megacpp.proof.module_places import Place
from nemo_megacpp.proof.share_tracking import Event
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.render import make_console

LAYOUT = ParallelLayout.parse("tp=2")
QKV = Place("decoder.layers.0.self_attention.linear_qkv", "ColumnParallelLinear", 1, "A", 1)
LAYER = Place("decoder.layers.0", "TransformerLayer", 1, "A", 1)
BYTES = 16 * 48 * 4
"""Hidden states of the tiny model's row in float32."""


def recorded(rank: int) -> list[RecordedGather]:
    """Return a gather that the layer's first product needs, and one that is cut at once."""
    product = Event("join", "mm", QKV.path, digest=str(rank))
    return [
        RecordedGather(
            *("all_gather", (0, 1), 0, "forward", LAYER, "layer.py:7", BYTES, True),
            events=[Event("own", "add", LAYER.path, "Layer.forward")],
            freed=f"backward {LAYER.path}",
        ),
        RecordedGather(
            *("all_gather", (0, 1), 1, "forward", QKV, "layers.py:9", BYTES, True),
            events=[product, Event("sent", "reduce_scatter", LAYER.path)],
            last_read=f"forward {QKV.path}",
            overwritten=True,
        ),
    ]


def sizes(length: int) -> Sizes:
    model = tiny_model("A", seq_length=length)
    return Sizes(Job(model, LAYOUT, precision="fp32", kernels="torch"))


def test_the_table_names_what_is_undone(capsys: pytest.CaptureFixture[str]) -> None:
    rows = gather_rows(judge([recorded(0), recorded(1)], LAYOUT), sizes(16), sizes(1600))
    print_gathers(make_console(156), rows)
    shown = capsys.readouterr().out
    assert "needed: matrix product with its own part" in shown
    assert "TransformerLayer (layer.py:7)" in shown.splitlines()[-1]
    assert "convenience gather: layer 1 (A), forward pass" in shown.splitlines()[-1]
    assert "307 KB" in shown, "a hundred times the tokens"
    print_gathers(make_console(156), rows[1:])
    assert capsys.readouterr().out.splitlines()[-1].startswith("every gather is needed")


def test_the_document_has_a_schema() -> None:
    rows = gather_rows(judge([recorded(0), recorded(1)], LAYOUT), sizes(16), sizes(1600))
    answer = json.loads(json.dumps(gathers_document("r", LAYOUT, rows), allow_nan=False))
    assert (answer["schema"], answer["undone"], answer["ranks"]) == (1, 1, 2)
    first, second = answer["gathers"]
    assert first == {
        "layer": 1,
        "family": "A",
        "phase": "forward",
        "module": LAYER.path,
        "class": "TransformerLayer",
        "caller": "layer.py:7",
        "collective": "all_gather",
        "group": "tp",
        "ranks": [0, 1],
        "bytes": BYTES,
        "recipe_bytes": 100 * BYTES,
        "lives_until": "backward: itself",
        "verdict": "undone",
        "operator": f"add in {LAYER.path}",
        "why": "cut back to this rank's share before element-wise sum in Layer.forward",
    }
    assert (second["verdict"], second["lives_until"]) == ("needed", "itself, kept")


def test_the_recipe_s_bytes_are_left_out_where_no_formula_knows_them() -> None:
    judged = judge([recorded(0), recorded(1)], LAYOUT)
    assert [row.recipe_bytes for row in gather_rows(judged, None, None)] == [None, None]
    judged[0].gather.bytes += 4
    assert gather_rows(judged, sizes(16), sizes(1600))[0].recipe_bytes is None


def test_too_many_ranks() -> None:
    layout = ParallelLayout.parse("tp=8,pp=4")
    with pytest.raises(UserError, match="32 ranks"):
        inspect_gathers(tiny_model("AEMR"), layout, lambda model, rows: None, lambda *_: [], {})
