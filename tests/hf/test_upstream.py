"""Mamba-2 models from elsewhere: transformers' ``Mamba2ForCausalLM``, and mamba_ssm's files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from nemo_megacpp.checkpoint.identity import read_identity
from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf.importing import import_hf
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks
from tests.hf.float64 import Float64
from tests.hf.models import run
from tests.hf.values import same, values

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_heads": 8,
    "head_dim": 12,
    "state_size": 10,
    "n_groups": 1,
    "num_hidden_layers": 2,
    "chunk_size": 16,
}
MAMBA_SSM: dict[str, Any] = {
    "d_model": 48,
    "n_layer": 2,
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "ssm_cfg": {"layer": "Mamba2", "headdim": 12, "d_state": 10},
    "vocab_size": 90,
    "rms_norm": True,
    "residual_in_fp32": True,
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 16,
}


def tiny(**changes: Any) -> Mamba2ForCausalLM:
    """Return a random model, every parameter away from where it starts."""
    torch.manual_seed(3)
    model = Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_logits(checkpoint: str, file: str) -> None:
    """Save tokens and logits of an imported checkpoint, in Megatron's model."""
    folder, layout = Path(checkpoint), ParallelLayout.parse("tp=1")
    start_model_parallel(layout)
    identity = read_identity(folder)
    assert identity is not None
    fields = config_fields(identity["model"], layout, torch.float64, "cpu")
    chunks = build_chunks(HybridConfig(**fields), layout)
    load_weights(chunks, folder / "weights")
    torch.save(run(chunks[0].eval(), 90), file)


def test_logits(ranks: WorkerPool, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "out"
    count = import_hf(tmp_path / "theirs", out, lambda _: contextlib.nullcontext(ranks))
    assert count == len(values(out))
    ranks.run(1, save_logits, str(out), str(tmp_path / "logits.pt"))
    tokens, found = torch.load(tmp_path / "logits.pt")
    with torch.no_grad(), Float64():
        wanted = model(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def _mamba_ssm(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """Write what mamba_ssm's ``save_pretrained`` writes: both tied matrices, in a pickle."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**MAMBA_SSM, **changes}))
    names = {"backbone.embeddings.weight": "backbone.embedding.weight"}
    held = {names.get(name, name): tensor for name, tensor in tensors.items()}
    torch.save(held, folder / "pytorch_model.bin")
    return folder


def test_the_files_of_mamba_ssm(ranks: WorkerPool, tmp_path: Path) -> None:
    model = tiny()
    model.lm_head.weight = model.backbone.embeddings.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    pool = lambda _: contextlib.nullcontext(ranks)  # noqa: E731
    import_hf(tmp_path / "theirs", tmp_path / "one", pool)
    tensors = model.state_dict()
    import_hf(_mamba_ssm(tmp_path / "ssm", tensors), tmp_path / "other", pool)
    assert same(values(tmp_path / "one"), values(tmp_path / "other"))
    identity = read_identity(tmp_path / "other")
    assert identity is not None and identity["model"]["share_embeddings_and_output_weights"]
    assert identity["model"]["vocab_size"] == 96, "the rows"
    untied = {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}
    with pytest.raises(UserError, match="embeddings are tied, and the head has other numbers"):
        import_hf(_mamba_ssm(tmp_path / "untied", untied), tmp_path / "out", pool)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_groups": 2}, "n_groups=2: transformers takes the gated norm over all channels"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"),
        ({"time_step_limit": [0.1, 1.0]}, r"time_step_limit=\[0.1, 1.0\]"),
        ({"conv_kernel": 3}, "conv_kernel=3: an M block has 4"),
        ({"use_bias": True}, "use_bias=True: an M block has False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_an_m_block_has_not(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tiny(**changes).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=reason):
        import_hf(tmp_path / "theirs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ssm_cfg": {}}, "ssm_cfg.layer is not 'Mamba2'"),
        ({"attn_layer_idx": [1]}, "only models of Mamba-2 alone"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 12, "d_conv": 3}}, "d_conv=3"),
    ],
)
def test_what_mamba_ssm_has_besides(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    theirs = _mamba_ssm(tmp_path / "ssm", tiny().state_dict(), **changes)
    with pytest.raises(UserError, match=reason):
        import_hf(theirs, tmp_path / "out")
