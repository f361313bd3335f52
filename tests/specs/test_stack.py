"""The named spec, and the stack over stages: every layer, once, under its global number."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.m2rnn_mixer import M2RNNMixer
from nemo_megacpp.mixers.mamba2_mixer import Mamba2Mixer
from nemo_megacpp.mixers.transformer_layers import AttentionLayer, FeedForwardLayer
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import fake_rank, start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from nemo_megacpp.specs import layer_stack
from nemo_megacpp.specs.hybrid_model import build_hybrid_model
from nemo_megacpp.specs.stack import HybridStack
from tests.bare import build_chunks, make_config, microbatches

TWELVE = "AEMEAEMEAEMR"


@pytest.mark.processes
def test_import_of_the_spec_is_light() -> None:
    """The package costs nothing; naming the spec loads Megatron-Core, and never NeMo."""
    code = (
        "import sys, nemo_megacpp.specs\n"
        "assert not {'torch', 'megatron', 'nemo'} & set(sys.modules), 'import'\n"
        "from nemo_megacpp.specs import hybrid_stack_spec\n"
        "assert 'megatron' in sys.modules\n"
        "assert not {'nemo', 'lightning'} & set(sys.modules), 'spec'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_megatron_finds_the_spec() -> None:
    found: Any = import_module(("nemo_megacpp.specs", "hybrid_stack_spec"))
    assert isinstance(found, ModuleSpec) and found.module is HybridStack
    package = __import__("nemo_megacpp.specs", fromlist=["hybrid_stack_spec"])
    assert vars(package)["hybrid_stack_spec"] is found
    with pytest.raises(ImportError, match="no_such_spec"):
        from nemo_megacpp.specs import no_such_spec  # type: ignore[attr-defined]  # noqa: F401


def _layers(pattern: str, text: str) -> list[tuple[int, str, int, bool, list[str]]]:
    """On a rank: virtual stage, letter, number, whether the final norm is here, and parameters."""
    layout = ParallelLayout.parse(text)
    start_model_parallel(layout)
    chunks: list[Any] = build_chunks(make_config(StepSpec(tiny_model(pattern)), layout), layout)
    return [
        (
            stage,
            _letter(layer),
            layer.layer_number,
            hasattr(chunk.decoder, "final_norm"),
            [name for name, _ in layer.named_parameters()],
        )
        for stage, chunk in enumerate(chunks)
        for layer in chunk.decoder.layers
    ]


def _letter(layer: Any) -> str:
    """What a layer is, by the exact classes of it and its mixer."""
    if type(layer) is MambaLayer:
        return {Mamba2Mixer: "M", M2RNNMixer: "R"}[type(layer.mixer)]
    if type(layer) is FeedForwardLayer:
        assert type(layer.mlp) is MLP
        return "F"
    if type(layer) is AttentionLayer:
        assert type(layer.mlp) is IdentityOp
        return "A"
    assert type(layer) is TransformerLayer and type(layer.mlp) is MoELayer
    return "E"


@pytest.mark.parametrize(
    ("pattern", "layout", "sizes"),
    [
        (TWELVE, "pp=1", [12]),
        (TWELVE, "pp=2", [6, 6]),
        (TWELVE, "pp=4", [3, 3, 3, 3]),
        (TWELVE, "pp=2,vpp=3", [2, 2, 2, 2, 2, 2]),
        ("AE|MEAEM|E|AEMR", "pp=4", [2, 5, 1, 4]),
        ("AE|MEAEM|E|AEMR", "pp=2,vpp=2", [2, 5, 1, 4]),
        ("FA|FM|F|F", "pp=2,vpp=2", [2, 2, 1, 1]),
    ],
)
def test_every_layer_is_built_once(
    ranks: WorkerPool, pattern: str, layout: str, sizes: list[int]
) -> None:
    """In order of depth: stages within a virtual stage, then the next virtual stage."""
    pp = ParallelLayout.parse(layout).pp
    built = ranks.run(pp, _layers, pattern, layout)
    chunks = [
        [layer for layer in built[index % pp] if layer[0] == index // pp]
        for index in range(len(sizes))
    ]
    assert [len(chunk) for chunk in chunks] == sizes
    assert "".join(letter for chunk in chunks for _, letter, *_ in chunk) == pattern.replace(
        "|", ""
    )
    numbers = [number for chunk in chunks for _, _, number, *_ in chunk]
    assert numbers == list(range(1, sum(sizes) + 1))
    norms = [{norm for *_, norm, _ in chunk} for chunk in chunks]
    assert norms == [{False}] * (len(sizes) - 1) + [{True}]


def test_parameter_names_are_transformer_engines(ranks: WorkerPool) -> None:
    """A checkpoint of the torch backend is one of Transformer Engine's."""
    (layers,) = ranks.run(1, _layers, "AEMRF", "pp=1")
    # From 0.19 on the Mamba mixer owns its convolution's parameters, under the same keys.
    names = {
        letter: {name.replace("conv1d_", "conv1d.") for name in parameters}
        for _, letter, _, _, parameters in layers
    }
    assert names["A"] == {
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
    }
    assert names["M"] == {
        *(f"mixer.{name}" for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")),
        *(f"mixer.{name}" for name in ("conv1d.weight", "conv1d.bias")),
        *(f"mixer.in_proj.{name}" for name in ("layer_norm_weight", "weight")),
    }
    assert {"pre_mlp_layernorm.weight", "mlp.router.weight"} < names["E"]
    assert {"norm.weight", "mixer.in_proj.weight"} < names["R"]
    assert names["F"] == {
        *("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
    }


def _refusal(pattern: str, text: str) -> str:
    try:
        _layers(pattern, text)
    except UserError as error:
        return str(error)
    return ""


def test_layers_that_do_not_divide_are_refused(ranks: WorkerPool) -> None:
    """On every rank, before anything waits for another, with the legal numbers of chunks."""
    messages = set(ranks.run(2, _refusal, "AEM", "pp=2"))
    assert len(messages) == 1
    (message,) = messages
    assert "3 layers" in message and "1, 3" in message, message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hybrid_pattern": "AM", "mamba_num_groups": 3},
            "Megatron refuses this model: nheads must be evenly divisible by ngroups.",
        ),
        (
            {"layernorm_zero_centered_gamma": True},
            "Install Transformer Engine or change these.",
        ),
        ({"add_bias_linear": True}, "Install it, or leave add_bias_linear at False."),
    ],
)
def test_what_a_module_refuses_is_said_to_the_user(settings: dict[str, Any], message: str) -> None:
    """Without the names of the modules that were being built."""
    config = make_config(StepSpec({**tiny_model("AE"), **settings}), ParallelLayout())
    with fake_rank(ParallelLayout(), 0), pytest.raises(UserError) as refusal:
        build_hybrid_model(config)
    assert str(refusal.value).endswith(message)


def _contexts(recipe: str) -> list[tuple[str, str]]:
    """Return the letters of the layers and the FP8 contexts that they ran in.

    Transformer Engine is stood in for: a context notes the layer it was opened for, ``all`` or
    ``bf16``, where Megatron's own opens none.
    """
    layout, opened, seen = ParallelLayout(), [""], []
    start_model_parallel(layout)
    spec = StepSpec(tiny_model("AEMR"))
    config = make_config(spec, layout)
    (chunk,) = build_chunks(config, layout)

    @contextlib.contextmanager
    def context(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        skipped = is_first_last_bf16_layer(config, layer_no)
        opened.append("bf16" if skipped else "all" if layer_no < 0 else str(layer_no))
        yield
        opened.pop()

    layer_stack.get_fp8_context = context  # type: ignore[assignment]
    config.fp8, config.fp8_recipe = "hybrid", Fp8Recipe(recipe)
    config.first_last_layers_bf16 = recipe != "delayed"
    layers: Any = chunk.decoder.layers  # type: ignore[union-attr]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: seen.append((_letter(layer), opened[-1])))
    batch = next(microbatches(spec))
    chunk(batch["tokens"], batch["position_ids"], None)
    assert opened == [""]
    return seen


@pytest.mark.parametrize(
    ("recipe", "contexts"),
    [
        ("delayed", ["all", "all", "all", "all"]),
        ("tensorwise", ["bf16", "1", "2", "bf16"]),
    ],
)
def test_fp8_contexts_are_those_of_megatrons_stack(
    ranks: WorkerPool, recipe: str, contexts: list[str]
) -> None:
    """One around all layers for delayed scaling, which keeps statistics across layers; else one
    per layer, and none for the first and last layers that stay in bfloat16."""
    (seen,) = ranks.run(1, _contexts, recipe)
    assert seen == list(zip("AEMR", contexts, strict=True))
