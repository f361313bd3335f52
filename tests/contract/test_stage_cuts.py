"""What crosses each cut, in bytes, and the warning inside a seam."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.contract.costs import costs
from nemo_megacpp.contract.stage_cuts import stage_cuts
from nemo_megacpp.contract.stages import build_stages
from nemo_megacpp.contract.traffic import pipeline_messages
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model


def _sizes(pattern: str, layout: str, **changes: Any) -> Sizes:
    model = tiny_model(pattern, **changes)
    return Sizes(Job(model, ParallelLayout.parse(layout), precision="fp32", kernels="torch"))


def test_hidden_states_alone() -> None:
    """16 tokens of 48 numbers of 4 bytes; under SP and CP a rank's share of them."""
    for layout, share in (("pp=4", 1), ("tp=2,pp=4", 2), ("tp=2,cp=2,pp=4", 4)):
        cuts = stage_cuts(_sizes("MRAR", layout), [1, 2, 3])
        assert [cut.items for cut in cuts] == [{"hidden states": 16 * 48 * 4 // share}] * 3
        assert [cut.between for cut in cuts] == ["M|R", "R|A", "A|R"]


def test_the_depth_state_crosses_where_it_lives() -> None:
    sizes = _sizes("MRARMR", "pp=6", m2rnn_depth_state=True)
    state = 16 * 4 * 4
    found = [cut.items.get("m2rnn_depth_state", 0) for cut in stage_cuts(sizes, range(1, 6))]
    assert found == [0, state, state, state, state]


def test_virtual_stages_pad_every_cut_to_whole_rows() -> None:
    """16 tokens of 4 numbers take 2 rows of 48, at a cut without the state as well."""
    for layout in ("pp=2,vpp=3", "pp=3,vpp=2"):
        first, second = stage_cuts(_sizes("MRARMR", layout, m2rnn_depth_state=True), [1, 2])
        hidden, state, rows = 16 * 48 * 4, 16 * 4 * 4, 2 * 48 * 4
        assert first.items == {"hidden states": hidden, "padding": rows}
        assert second.items == {
            "hidden states": hidden,
            "m2rnn_depth_state": state,
            "padding": rows - state,
        }


@pytest.mark.parametrize(
    ("layout", "changes", "shapes"),
    [
        ("pp=3,vpp=2", {}, False),
        ("pp=3,vpp=2", {"m2rnn_depth_state": True}, False),
        ("pp=6", {"m2rnn_depth_state": True}, True),
        ("pp=6", {"variable_seq_lengths": True}, True),
    ],
)
def test_messages_are_the_cuts_and_their_shapes(
    layout: str, changes: dict[str, Any], shapes: bool
) -> None:
    """Each cut is sent once forward and once back, and where shapes are, so is the shape."""
    sizes = _sizes("MRARMR", layout, **changes)
    cuts = stage_cuts(sizes, range(1, 6))
    sent = [
        message.bytes
        for stage in build_stages(sizes.job)
        for message in pipeline_messages(sizes, stage)
        if message.kind == "send"
    ]
    expected = 2 * [cut.bytes for cut in cuts] + [24] * (2 * len(cuts) * shapes)
    assert sorted(sent) == sorted(expected)
    assert shapes == any(
        "Shape messages" in cost.message for cost in costs(sizes, build_stages(sizes.job))
    )


@pytest.mark.parametrize(
    ("pattern", "seam"),
    [
        ("AR|RA", "the 16 steps of R's recurrence, the message, the 16 steps of R's recurrence"),
        ("AE|RA", "the exchange of E's tokens, the message, the 16 steps of R's recurrence"),
        ("AE|EA", "the exchange of E's tokens, the message, the exchange of E's tokens"),
        ("AR|MA", ""),
        ("RA|ER", ""),
    ],
)
def test_a_cut_inside_a_seam_is_warned_about(pattern: str, seam: str) -> None:
    sizes = _sizes(pattern, "pp=2")
    found = [
        cost.message for cost in costs(sizes, build_stages(sizes.job)) if "seam" in cost.message
    ]
    assert len(found) == bool(seam)
    for message in found:
        assert message.startswith(f"Cut inside a seam: {pattern[1:4]} before layer 2, 3.07 KB each")
        assert seam in message
