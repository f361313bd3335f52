"""Which layouts draw the same dropout masks, and which ranks must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel

from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, compare
from nemo_megacpp.proof.main_parameters import gather_parameters
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult, gather_gradients
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config, prepare, save_initial_weights
from tests.training_steps import mean_loss

HIDDEN = {"hidden_dropout": 0.3}
ATTENTION = {"attention_dropout": 0.3}


def _seed(seed: int) -> None:
    """Seed as Megatron does before a run, without what building the model has drawn."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _step(spec: StepSpec, layout: ParallelLayout, weights: str) -> StepResult | None:
    trainee = prepare(spec, layout)
    load_weights(trainee.chunks, weights)
    trainee.optimizer.reload_model_params()
    _seed(spec.seed)
    loss = mean_loss(trainee.forward_backward())
    gradients = gather_gradients(trainee.chunks, trainee.wrapped)
    _, norm, _ = trainee.optimizer.step()
    parameters = gather_parameters(trainee.chunks, trainee.wrapped)
    if gradients is None or parameters is None:
        return None
    return StepResult([loss], [float(norm)], {}, gradients, parameters)


@pytest.mark.parametrize(
    ("dropout", "pattern", "layouts"),
    [
        pytest.param(HIDDEN, "AMR", ("tp=1", "tp=2,sp=false"), id="hidden-tp-without-sp"),
        pytest.param(ATTENTION, "AM", ("tp=2,sp=false", "tp=2"), id="attention-sp"),
        pytest.param(HIDDEN | ATTENTION, "AE", ("world=2", "ep=2"), id="ep"),
        pytest.param(
            HIDDEN | ATTENTION, "AE", ("tp=2,etp=2", "tp=2,etp=1", "tp=2,ep=2,etp=1"), id="etp-ep"
        ),
    ],
)
def test_axes_that_do_not_change_the_masks(
    ranks: WorkerPool,
    tmp_path: Any,
    dropout: dict[str, float],
    pattern: str,
    layouts: tuple[str, ...],
) -> None:
    """The first layout's step is that of the others, and not the one without dropout."""
    spec, one = StepSpec(tiny_model(pattern, **dropout)), ParallelLayout()
    ranks.run(1, save_initial_weights, spec, one, str(tmp_path))
    undropped = ranks.run(1, _step, StepSpec(tiny_model(pattern)), one, str(tmp_path))[0]
    places = [ParallelLayout.parse(text) for text in layouts]
    expected, *results = (
        ranks.run(place.world, _step, spec, place, str(tmp_path))[0] for place in places
    )
    assert abs(expected.losses[0] - undropped.losses[0]) > 1e-4
    for result in results:
        broken = [check for check in compare(expected, result, FLOAT32) if not check.passed]
        assert not broken, broken


def _dropped() -> Any:
    """Return which outputs of an R block dropout has set to zero, ``[s/tp, b, h]``."""
    layout = ParallelLayout.parse("tp=2")
    start_model_parallel(layout)
    config = make_config(StepSpec(tiny_model("R", hidden_dropout=0.5)), layout)
    (chunk,) = build_chunks(config, layout)
    decoder: Any = chunk.decoder
    x = torch.randn(8, 1, config.hidden_size, generator=torch.Generator().manual_seed(1))
    outputs: list[torch.Tensor] = []
    decoder.layers[0].register_forward_hook(lambda _, inputs, output: outputs.append(output))
    _seed(1)
    decoder(x, None)
    return (outputs[0] == x).numpy()


def test_with_sp_ranks_drop_different_tokens(ranks: WorkerPool) -> None:
    """As in Megatron's ``TransformerBlock``: ranks hold different tokens."""
    first, second = ranks.run(2, _dropped)
    assert 0.4 < first.mean() < 0.6 and 0.4 < second.mean() < 0.6
    assert 0.4 < (first == second).mean() < 0.6
