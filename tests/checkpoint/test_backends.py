"""A checkpoint does not know which backend wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nemo_megacpp.checkpoint.backends import fit_to_checkpoint, other_name
from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict, save_model
from nemo_megacpp.checkpoint.safe_pickle import read_metadata
from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from nemo_megacpp.specs.backend import TorchBackend
from nemo_megacpp.specs.hybrid_model import build_hybrid_model
from tests.bare import make_config
from tests.checkpoint.conftest import SMALL
from tests.checkpoint.te_backend import SCALES, TransformerEngineNames, _ExtraState

OTHER_SCALES = {"scale_fwd": 7}
LAYOUT = "ep=2,etp=1"


def _build(backend: str) -> list[torch.nn.Module]:
    layout = ParallelLayout.parse(LAYOUT)
    if not parallel_state.model_parallel_is_initialized():
        start_model_parallel(layout)
    names = {"te": TransformerEngineNames, "torch": TorchBackend}
    return [build_hybrid_model(make_config(SMALL, layout), backend=names[backend]())]


def _tensors(chunks: list[torch.nn.Module]) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    """What a model would save, by key and place."""
    found = {}
    for value in nested_values(model_sharded_state_dict(chunks)):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            if isinstance(part, ShardedTensor):
                found[part.key, tuple(part.global_offset)] = part.data.detach().clone()
    return found


def _across(there: str, here: str, folder: str) -> tuple[int, int, list[str], set[Any]]:
    """Save with one backend, load into the other.

    Return how many tensors, how many of them changed by the load, those that differ, the scales.
    """
    torch.manual_seed(5)
    saved = _build(there)
    with torch.no_grad():
        for parameter in saved[0].parameters():
            parameter.copy_(torch.randn_like(parameter))
    for module in saved[0].modules():
        if isinstance(module, _ExtraState):
            module.scales = OTHER_SCALES
    save_model(saved, folder)
    wanted = _tensors(saved)
    loaded = _build(here)
    before = _tensors(loaded)
    load_weights(loaded, folder)
    after = _tensors(loaded)
    assert wanted.keys() == before.keys() == after.keys()
    moved = sum(not torch.equal(before[key], after[key]) for key in after)
    wrong = [str(key) for key in wanted if not torch.equal(wanted[key], after[key])]
    modules = [module for module in loaded[0].modules() if isinstance(module, _ExtraState)]
    scales = {str(module.scales) for module in modules}
    return len(wanted), moved, wrong, scales


@pytest.mark.parametrize(("there", "here"), [("torch", "te"), ("te", "torch"), ("te", "te")])
def test_every_tensor_arrives(ranks: WorkerPool, there: str, here: str, tmp_path: Path) -> None:
    for count, moved, wrong, scales in ranks.run(2, _across, there, here, str(tmp_path / "c")):
        assert not wrong
        assert count > 40
        assert moved > 30, "what was compared came from the checkpoint"
        if (there, here) == ("torch", "te"):
            # torch's linears save None, its norms and attention nothing: these keep their own
            assert scales == {"None", str(SCALES)}
        elif here == "te":
            assert scales == {str(OTHER_SCALES)}


def _without_the_map(folder: str) -> None:
    save_model(_build("torch"), folder)
    dist_checkpointing.load(model_sharded_state_dict(_build("te")), folder)


def test_the_map_is_needed(ranks: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="_extra_state"):
        ranks.run(2, _without_the_map, str(tmp_path / "c"))


# --- names

PAIRS = [
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias"),
    ("mixer.in_proj.layer_norm_weight", "norm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
]


@pytest.mark.parametrize("prefix", ["", "module.", "optimizer.state.exp_avg.module."])
@pytest.mark.parametrize(("fused", "unfused"), PAIRS)
def test_names_go_both_ways(prefix: str, fused: str, unfused: str) -> None:
    fused, unfused = (f"{prefix}decoder.layers.12.{name}" for name in (fused, unfused))
    assert other_name(fused) == unfused
    assert other_name(unfused) == fused


@pytest.mark.parametrize(
    "key",
    [
        "decoder.final_norm.weight",
        "decoder.layers.2.mixer.norm.weight",
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "embedding.word_embeddings.weight",
    ],
)
def test_what_has_one_name_keeps_it(key: str) -> None:
    assert other_name(key) is None


def _sharded(key: str) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.zeros(2))


def test_only_what_is_missing_is_asked_for_by_its_other_name() -> None:
    prefix = "decoder.layers.0."
    fused, unfused = (prefix + name for name in PAIRS[0])
    saved: dict[str, Any] = {
        unfused: None,
        prefix + "norm.weight": None,
        "x._extra_state/shard_0_1": BytesStorageMetadata(),
    }
    wanted: dict[str, Any] = {
        "renamed": _sharded(fused),
        "there": _sharded(prefix + "norm.weight"),
        "nowhere": _sharded(prefix + "mixer.in_proj.weight"),
        "list": [ShardedObject("x._extra_state", "mine", (1,), (0,))],
        "fresh": ShardedObject("y._extra_state", "mine", (1,), (0,)),
        "other": ShardedObject("rng_state", "mine", (1,), (0,)),
    }
    fit_to_checkpoint(wanted, Metadata(saved, None, {}))
    assert wanted["renamed"].key == unfused
    assert wanted["there"].key == prefix + "norm.weight"
    assert wanted["nowhere"].key == prefix + "mixer.in_proj.weight"
    assert isinstance(wanted["list"][0], ShardedObject)
    assert isinstance(wanted["fresh"], LocalNonpersistentObject)
    assert isinstance(wanted["other"], ShardedObject), "only a module's own state may stay"


def test_the_torch_backend_has_the_fused_names(small_weights: Path) -> None:
    """So a checkpoint of Transformer Engine's fused modules needs no renaming at all."""
    names = read_metadata(small_weights).state_dict_metadata
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.2.mixer.in_proj.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in names
