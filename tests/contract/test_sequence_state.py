"""What a plan says about the state of a sequence; tests/specs/test_inference.py holds the bytes to
what is allocated."""

from __future__ import annotations

from nemo_megacpp.contract.sequence_state import sequence_state, state_line
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.render import show_bytes


def _sizes(pattern: str, layout: str) -> Sizes:
    return Sizes(Job(tiny_model(pattern), ParallelLayout.parse(layout)))


def test_attention_grows_and_recurrence_does_not() -> None:
    # In bfloat16 at TP=2: A keeps 2 heads of 6 keys and values; M a window of 3 taps on 24 + 40
    # channels, and 4 states of 6 x 10 in float32; R one on 10 + 24 channels, and 6 of 5 x 4.
    m, r = 64 * 3 * 2 + 240 * 4, 34 * 3 * 2 + 120 * 4
    assert state_line(_sizes("AEMAR", "tp=2")) == (
        f"Generating at TP=2, a rank keeps of a sequence {show_bytes(m + r)} (M, R), and of "
        f"each of its tokens 96 B (A): {show_bytes(m + r + 96 * 16)} at 16 tokens."
    )


def test_stages_share_the_state_by_their_layers() -> None:
    told = str(state_line(_sizes("AE|MR", "tp=2,pp=2")))
    assert told.startswith("Generating at TP=2 and PP=2, the ranks of a pipeline together keep of")
    assert told.endswith(" at 16 tokens; a stage keeps the part of its own layers.")


def test_a_layer_that_keeps_nothing_says_so() -> None:
    assert sequence_state(_sizes("EF", "tp=1")) == {"E": [], "F": []}
    assert "nothing, and of each of its tokens nothing" in str(state_line(_sizes("EF", "tp=1")))
