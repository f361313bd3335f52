"""On GPUs: layouts hold in every dtype, and the torch forms give the numbers of the CPU.

No GPU was at hand when these were written: they have not run on one yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.case_kernels import kernels_for
from nemo_megacpp.proof.case_runner import CaseRunner
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.small_models import proxy_model
from nemo_megacpp.proof.step_spec import Dtype, StepSpec
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import PATH, run_step

pytestmark = pytest.mark.gpu
ONE = ParallelLayout()


def _model(pattern: str = "AEMR") -> dict:
    """NAM56R's proportions, at widths that the kernels take."""
    recipe = resolve("nam56r", [f"pattern={pattern}", f"depth={len(pattern)}"])
    model = {**recipe.model, "m2rnn_num_heads": 8}
    return proxy_model(model, ONE, kernels_for("cuda", "bfloat16").narrowest)


def test_torch_forms_give_the_numbers_of_the_cpu(gpu_ranks: WorkerPool, ranks: WorkerPool) -> None:
    spec = StepSpec(_model(), objective="logits", dtype="float64")
    here = ranks.run(1, run_step, spec, ONE)[0]
    there = gpu_ranks.run(1, run_step, spec, ONE, here.initial)[0]
    broken = [check for check in compare(here, there, FLOAT64) if not check.passed]
    assert not broken


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("text", ["tp=1", "tp=2,etp=1", "cp=2", "ep=2", "tp=2,cp=2,etp=1"])
def test_a_layout_holds(gpu_ranks: WorkerPool, tmp_path: Path, text: str, dtype: Dtype) -> None:
    layout = ParallelLayout.parse(text)
    if layout.world > gpu_ranks.size:
        pytest.skip(f"needs {layout.world} GPUs")
    case = CaseRunner(gpu_ranks, PATH, tmp_path, _model()).run("all", "together", layout, dtype)
    assert case.passed, case
