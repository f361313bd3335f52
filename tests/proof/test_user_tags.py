"""Tags against what ranks hold: a user's family that forgets one, and models that forget none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.proof.tag_check import TagViolation, tag_violations
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config
from tests.path import run_step
from tests.reference import Reference

EXAMPLE = Path(__file__).parents[2] / "examples" / "short_conv.py"
_WEIGHT = "        self.conv_weight = self.split_parameter(channels, settings.taps)\n"
_TAGGED = "        self.gain = self.split_parameter(channels, fill=1.0)\n"
_UNTAGGED = """\
        self.gain = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype))
"""
_SCALED = "self.out_proj(heads_to_sequence(c * y * (1 + 1e-3 * self.gain), self.cp_group, order))"


def _family(folder: Path, tagged: bool) -> str:
    """Write a user's family: the example with a gain per channel that has a small gradient."""
    text = EXAMPLE.read_text()
    for old, new in (
        (_WEIGHT, _WEIGHT + (_TAGGED if tagged else _UNTAGGED)),
        ("self.out_proj(heads_to_sequence(c * y, self.cp_group, order))", _SCALED),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    file = folder / f"family_{tagged}.py"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("tagged", [True, False])
def test_a_tag_that_a_family_forgets(
    ranks: WorkerPool, reference: Reference, tmp_path: Path, tagged: bool
) -> None:
    """The norm is off by less than its tolerance, and nothing else differs: only counting tells."""
    model = tiny_model("AC", family_modules=[_family(tmp_path, tagged)])
    spec = StepSpec(model, objective="logits", dtype="float64")
    weights, expected = reference(spec)
    layout = ParallelLayout.parse("tp=2")
    result = ranks.run(2, run_step, spec, layout, weights)[0]
    broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
    if tagged:
        assert not broken
        return
    assert [check.name for check in broken] == ["tags"]
    assert broken[0].where == "decoder.layers.1.mixer.gain"
    assert "set_tensor_model_parallel_attributes(parameter, True, 0, 1)" in broken[0].problem


def _tags_in(model: dict[str, Any], layouts: list[str]) -> dict[str, list[TagViolation]]:
    found = {}
    for text in layouts:
        layout = ParallelLayout.parse(text)
        start_model_parallel(layout)
        spec = StepSpec(model, dtype="float32")
        found[text] = tag_violations(build_chunks(make_config(spec, layout), layout))
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        # What the parity suite has no step of; there this check is asked of every case.
        (
            tiny_model("AEMR", share_embeddings_and_output_weights=True),
            ["pp=4", "world=4,pp=2", "tp=2,pp=2,etp=1", "pp=2,ep=2", "world=4"],
        ),
        (
            tiny_model("AEMR", mode="mamba3", mamba3_output_norm=True),
            ["world=4,tp=2,etp=1", "tp=2,ep=2,etp=2", "tp=2,ep=4,etp=1", "tp=2,cp=2,etp=1"],
        ),
        (tiny_model("ARMRM", add_bias_linear=False), ["tp=4,sp=false", "world=4,tp=2,sp=false"]),
    ],
)
def test_models_tag_what_they_split(
    ranks: WorkerPool, model: dict[str, Any], layouts: list[str]
) -> None:
    found = ranks.run(4, _tags_in, model, layouts)
    assert found[0] == {text: [] for text in layouts}
    assert found[1:] == found[:-1], "every rank gets the answer"
