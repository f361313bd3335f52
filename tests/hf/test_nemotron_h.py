"""``checkpoint export --to nemotron_h``; :mod:`tests.hf.test_newer` compares its logits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_megacpp.hf.importing import import_hf
from nemo_megacpp.hf.nemotron_h import export_nemotron_h
from nemo_megacpp.runtime.workers import WorkerPool
from tests.hf.cases import NATIVE
from tests.hf.command import command
from tests.hf.values import same, values


@pytest.mark.parametrize("name", NATIVE)
def test_there_and_back(
    name: str, ranks: WorkerPool, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    export_nemotron_h(saved(name), tmp_path / "out")
    import_hf(tmp_path / "out", tmp_path / "back", lambda _: contextlib.nullcontext(ranks))
    assert same(values(saved(name)), values(tmp_path / "back"))


def test_the_pattern(saved: Callable[[str], Path], tmp_path: Path) -> None:
    export_nemotron_h(saved("native"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["hybrid_override_pattern"]) == ("nemotron_h", "M*E-M")


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("all", ("R blocks", "position_embedding_type='rope'", "activation silu with a gate")),
        ("MIMO", ("mode='mamba3'",)),
        ("A no positions", ("layernorm_epsilon=0.001",)),
        (
            "A gate, biases of q, k, v",
            ("softmax_scale=0.3", "attention_output_gate=True", "add_qkv_bias=True"),
        ),
        ("tied", ("share_embeddings_and_output_weights=True",)),
        ("biases", ("add_bias_linear=True", "activation gelu without a gate")),
        ("E softmax", ("moe_router_score_function='softmax'", "moe_shared_expert_gate=True")),
        ("E softmax after top-k", ("no moe_shared_expert_intermediate_size",)),
        ("E groups", ("Megatron ranks a group by its best 1",)),
        ("E one", ("moe_apply_probs_on_input=True",)),
    ],
)
def test_the_rest_is_refused(
    name: str,
    reasons: tuple[str, ...],
    saved: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With all reasons, and nothing is written."""
    out = tmp_path / "out"
    assert command("export", saved(name), "--to", "nemotron_h", out) == 2
    told = capsys.readouterr().err
    assert all(reason in told for reason in reasons), told
    assert not list(tmp_path.iterdir())
