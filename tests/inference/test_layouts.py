"""Layouts: over TP, EP and PP, slots give the logits and the tokens of one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.inference.completions import Prompt, complete
from nemo_megacpp.inference.sampling import GREEDY
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.workers import WorkerPool
from tests.generation import CASES, random_model

TOLERANCE = 1e-10
"""Of the largest logit, in float64."""
VOCAB, NEW, LENGTH = 118, 5, 16
PROMPTS = ([5, 17, 80, 2], [9], [44, 3, 3, 71, 60, 12, 7])
MODELS = {
    "AEMR": CASES["AEMR"],
    "AEMR mamba3": {**CASES["AEMR mamba3"], "hybrid_pattern": "AEM|RF"},
    "tied": {**CASES["AEMR"], "share_embeddings_and_output_weights": True},
    "depth state": tiny_model("RF|FRR", m2rnn_depth_state=True),
}
CHECKED = [
    ("AEMR", "pp=2"),
    ("AEMR", "pp=4"),
    ("AEMR", "tp=2,pp=2,sp=false"),
    ("AEMR", "tp=2,ep=2,etp=1,sp=false"),
    ("AEMR", "tp=2,ep=2,sp=false,world=4"),
    ("AEMR", "ep=2,pp=2,world=4"),
    ("AEMR mamba3", "pp=2"),
    ("tied", "pp=2"),
    ("depth state", "pp=2"),
]


def _generated(
    name: str, layout: str, weights: str, save: bool
) -> tuple[np.ndarray, list[list[int]]]:
    """Return logits of prompts that begin at different times, and greedy tokens of all of them."""
    model = random_model(MODELS[name], layout, None if save else weights)
    if save:
        save_model([model], weights)
    batch = SlotBatch(model, 3, LENGTH, VOCAB)
    added = batch.add_all(PROMPTS[:2])
    found = [logits for _, logits in added]
    (first, _), (second, _) = added
    found += batch.step({first: 4, second: 90}).values()
    batch.remove(first)
    third, logits = batch.add(PROMPTS[2])
    found += [logits, *batch.step({third: 31, second: 8}).values()]
    found.append(batch.extend(second, [1, 2, 3]))
    prompts = [Prompt(tuple(tokens), NEW, GREEDY) for tokens in PROMPTS]
    done, _ = complete(SlotBatch(model, 2, LENGTH, VOCAB), prompts, lambda ids: "", None)
    return np.stack([each.numpy() for each in found]), [each.tokens for each in done]


@pytest.fixture(scope="module")
def one_rank(
    ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, tuple[np.ndarray, list[list[int]]]]]:
    """What one rank generates, and its weights, by model."""
    found = {}
    for name in MODELS:
        weights = tmp_path_factory.mktemp("weights") / "step=1"
        found[name] = weights, ranks.run(1, _generated, name, "tp=1", str(weights), True)[0]
    return found


@pytest.mark.parametrize(("name", "layout"), CHECKED)
def test_every_layout_gives_the_logits_and_tokens_of_one_rank(
    ranks: WorkerPool,
    one_rank: dict[str, tuple[Path, tuple[np.ndarray, list[list[int]]]]],
    name: str,
    layout: str,
) -> None:
    weights, (wanted, tokens) = one_rank[name]
    assert all(len(each) == NEW for each in tokens)
    world = ParallelLayout.parse(layout).world
    for logits, found in ranks.run(world, _generated, name, layout, str(weights), False):
        assert abs(logits - wanted).max() < TOLERANCE * abs(wanted).max()
        assert found == tokens
