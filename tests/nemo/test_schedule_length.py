"""The schedule is told how long a message between stages is, under any strategy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.nemo.hybrid_gpt import HybridGPTModel
from nemo_megacpp.nemo.schedule_length import ScheduleLength
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from tests.bare import make_config


def _step(layout: str, batches: bool = False, **changes: Any) -> SimpleNamespace:
    spec = StepSpec(tiny_model("RARA", **changes))
    config: HybridConfig = make_config(spec, ParallelLayout.parse(layout))
    module = SimpleNamespace(config=config)
    return SimpleNamespace(pl_module=module, seq_length=16, has_global_batch_sampler=batches)


def test_a_step_gets_the_rows_of_its_messages() -> None:
    """16 tokens of 4 numbers take 2 rows of 48; on a rank of TP=2, SP and CP=2, 4 tokens take 1."""
    for layout, rows in (("pp=2,vpp=2", 18), ("tp=2,cp=2,pp=2,vpp=2", 20), ("pp=2", 16)):
        step = _step(layout, m2rnn_depth_state=True)
        ScheduleLength().on_megatron_microbatches_start(step)
        assert step.seq_length == rows
    step = _step("pp=2,vpp=2", batches=True)
    ScheduleLength().on_megatron_microbatches_start(step)
    assert step.seq_length == 16


def test_batches_with_a_length_of_their_own_are_refused() -> None:
    step = _step("pp=2,vpp=2", batches=True, m2rnn_depth_state=True)
    with pytest.raises(UserError, match="dataloader_type='batch'"):
        ScheduleLength().on_megatron_microbatches_start(step)


def test_the_model_brings_it() -> None:
    config = make_config(StepSpec(tiny_model("RARA")), ParallelLayout())
    callbacks = HybridGPTModel(config).configure_callbacks()  # type: ignore[arg-type]
    assert [type(callback) for callback in callbacks] == [ScheduleLength]
