"""Megatron's own engine on our model: its text generation controller gives our tokens."""

from __future__ import annotations

import pytest

from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.errors import UserError
from nemo_megacpp.inference.completions import Prompt, complete
from nemo_megacpp.inference.sampling import GREEDY
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.workers import WorkerPool
from tests.generation import CASES, random_model
from tests.inference.megatron_engine import LENGTH, NEW, PROMPTS, VOCAB, static_engine, text_of


def _our_tokens(weights: str) -> list[list[int]]:
    """Return the tokens of one rank, and save its weights."""
    model = random_model(CASES["AEMR"])
    save_model([model], weights)
    batch = SlotBatch(model, len(PROMPTS), LENGTH, VOCAB)
    asked = [Prompt(tuple(prompt), NEW, GREEDY) for prompt in PROMPTS]
    return [one.tokens for one in complete(batch, asked, text_of, None)[0]]


def _engines_tokens(layout: str, weights: str, legacy: bool, whole: int) -> list[list[int]]:
    from megatron.core.inference.sampling_params import SamplingParams

    engine = static_engine(random_model(CASES["AEMR"], layout, weights), legacy, whole)
    done = engine.generate(
        prompts=[text_of(prompt) for prompt in PROMPTS],
        sampling_params=SamplingParams(top_k=1, num_tokens_to_generate=NEW),
    )
    return [[int(token) for token in request.generated_tokens] for request in done]


@pytest.fixture(scope="module")
def ours(
    ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[list[int]]]:
    """The weights, and our tokens."""
    weights = str(tmp_path_factory.mktemp("weights") / "step=1")
    return weights, ranks.run(1, _our_tokens, weights)[0]


@pytest.mark.parametrize(
    ("layout", "legacy", "whole"),
    [
        ("tp=1", True, -1),
        # Without a GPU it cannot build its dynamic engine, and goes on without.
        pytest.param("tp=1", False, -1, marks=pytest.mark.slow),
        ("tp=2,sp=false", True, -1),
        ("pp=2", True, -1),
        ("pp=2", True, 1),
        ("tp=2,ep=2,etp=1,sp=false", True, -1),
    ],
)
def test_megatrons_static_engine_gives_our_tokens(
    ranks: WorkerPool, ours: tuple[str, list[list[int]]], layout: str, legacy: bool, whole: int
) -> None:
    weights, wanted = ours
    assert all(len(tokens) == NEW for tokens in wanted)
    world = ParallelLayout.parse(layout).world
    for tokens in ranks.run(world, _engines_tokens, layout, weights, legacy, whole):
        assert tokens == wanted


def _depth_state() -> str:
    from megatron.core.inference.contexts import StaticInferenceContext

    model = random_model(tiny_model("RF|FR", m2rnn_depth_state=True), "pp=2")
    with pytest.raises(UserError) as error:
        model.decoder.check_inference(StaticInferenceContext(1, 4), None)
    return str(error.value)


def test_megatrons_wrapper_takes_no_depth_state_over_stages(ranks: WorkerPool) -> None:
    for message in ranks.run(2, _depth_state):
        assert "Megatron's inference receives the hidden states alone" in message
