"""Whose gathered parameters are waited for; with the gathers themselves in tests/specs."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from megatron.core.distributed import distributed_data_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.parameter_gather import wait_for_parameters
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config, microbatches


def _hook(seen: list[torch.nn.Module]) -> Any:
    """Return a forward pre-hook that looks like one of Megatron's data-parallel wrapper."""

    def hook(module: torch.nn.Module, *unused: Any) -> None:
        seen.append(module)

    hook.__module__ = distributed_data_parallel.__name__
    return hook


def test_only_megatrons_own_hooks_are_called() -> None:
    waited: list[torch.nn.Module] = []
    others: list[torch.nn.Module] = []
    linear, bare = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    linear.register_forward_pre_hook(lambda module, _: others.append(module))
    linear.register_forward_pre_hook(_hook(waited))
    wait_for_parameters(bare, linear)
    assert waited == [linear] and not others


def _stock_mamba(backend: BackendSpecProvider, settings: Any) -> ModuleSpec:
    mixer = MambaMixerSubmodules(
        in_proj=backend.column_parallel_layer_norm_linear(), out_proj=backend.row_parallel_linear()
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(module=MambaMixer, submodules=mixer), mamba_bda=get_bias_dropout_add
        ),
    )


def _waits_for_the_convolution(pattern: str) -> int:
    """Return how often a forward pass waits for the parameters of ``conv1d``, which no M calls."""
    register(BlockFamily("Z", _stock_mamba))
    layout, spec, seen = ParallelLayout(), StepSpec(tiny_model(pattern)), []
    start_model_parallel(layout)
    config = make_config(spec, layout)
    (chunk,) = build_chunks(config, layout)
    decoder: Any = chunk.decoder
    decoder.layers[0].mixer.conv1d.register_forward_pre_hook(_hook(seen))
    batch = next(microbatches(spec))
    chunk(batch["tokens"], batch["position_ids"], None)
    return len(seen)


@pytest.mark.skipif(
    "name" in signature(MambaMixer.__init__).parameters,
    reason="this Megatron's mixer owns the convolution's parameters, and is called itself",
)
def test_mamba2_and_any_added_family_wait(ranks: WorkerPool) -> None:
    """Z is the stock mixer, as a user's family whose block does not wait by itself."""
    assert ranks.run(1, _waits_for_the_convolution, "M") == [1]
    assert ranks.run(1, _waits_for_the_convolution, "Z") == [1]
